"""Exact weights, rounding, 8-bit codes and their kernels."""
