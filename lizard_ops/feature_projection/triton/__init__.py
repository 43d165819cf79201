"""Triton kernels of the projection before a feature map."""
