"""Triton kernels of hybrid attention, each file one family of kernels with its launcher."""
