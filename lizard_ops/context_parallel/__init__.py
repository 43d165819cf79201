"""A sequence that lies over several ranks: what a rank must know of those before it."""
