"""Until when each key stays exact: reference and tiled forms."""
