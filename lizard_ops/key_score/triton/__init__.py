"""Scores of keys on the GPU."""
