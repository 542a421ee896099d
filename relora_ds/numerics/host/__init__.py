"""What computes on processors: kernels in C, and matrix products by the faster of two libraries."""
