"""Trustworthy files: weights, folders that appear whole, where things are fetched from, the machine."""
