"""The numbers that a layer reads from its input."""
