"""Scores of keys, one token at a time."""
