"""Triton kernels of gated attention, each file one family of kernels."""
