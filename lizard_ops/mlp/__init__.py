"""What stands between the projections of a transformer's MLP."""
