"""Projections of attention heads."""
