"""Matrices that products read and write at a larger shape, so that every row is aligned.

On GPUs the fast kernels for bf16 want extents and distances of rows in multiples of 16 bytes. A
matrix of another width is filled up with zeros for a product, and the product's result is cut: what
is added to a sum is exactly zero. Only buffers are larger, never what is stored.
"""

from __future__ import annotations

import torch

_ALIGNED_BYTES = 16
_MULTIPLE = 8
"""Elements; 16 bytes in bf16."""


def padded_width(width: int, element: int) -> int:
    """`width`, or the next multiple of 8 where rows of that width are not aligned.

    Args:
        width: elements of a row.
        element: bytes of one.
    """
    if width * element % _ALIGNED_BYTES == 0:
        return width
    return -(-width // _MULTIPLE) * _MULTIPLE


def padded(matrix: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """A copy (rows, cols) of a matrix with zeros behind its rows and columns.

    Args:
        matrix: is returned itself where it has that shape.
        rows: at least those of `matrix`.
        cols: at least those of `matrix`.
    """
    m, n = matrix.shape
    if (m, n) == (rows, cols):
        return matrix
    out = matrix.new_empty(rows, cols)
    out[:m, :n] = matrix
    out[m:].zero_()
    out[:m, n:].zero_()
    return out


def cut(matrix: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The first rows and columns of a matrix, contiguous; itself where it has that shape."""
    if matrix.shape == (rows, cols):
        return matrix
    return matrix[:rows, :cols].contiguous()
