"""Triton kernels of window attention, each file one family of kernels."""
