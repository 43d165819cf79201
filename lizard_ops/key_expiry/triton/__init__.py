"""Key expiry on the GPU."""
