"""Triton kernels, and when they serve."""
