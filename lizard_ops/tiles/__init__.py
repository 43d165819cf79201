"""What Triton files share: constants, addresses, masked loads, feature and decay tiles."""
