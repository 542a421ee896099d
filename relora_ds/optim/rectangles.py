"""A stretch of a flattened matrix as rectangles: tail of a row, whole rows, head of a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rectangle:
    """Rows and columns of a matrix whose elements lie one behind the other in a stretch."""

    at: int
    """Index of the first element within the stretch."""
    row: int
    """First row, of the global matrix."""
    col: int
    """First column, likewise."""
    rows: int
    cols: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The rectangle (rows, cols) as a live view of the 1-D stretch."""
        return flat.narrow(0, self.at, self.rows * self.cols).view(self.rows, self.cols)


def rectangles(
    start: int, count: int, cols: int, row: int = 0, col: int = 0
) -> Iterator[Rectangle]:
    """Elements [start, start + count) of a flattened matrix as at most three rectangles.

    Args:
        cols: width of the matrix that is flattened.
        row: row of its first element in the global matrix.
        col: column of it, likewise.
    """
    at, end = start, start + count
    while at < end:
        first, inside = divmod(at, cols)
        whole = inside == 0 and end - at >= cols
        rows = (end - at) // cols if whole else 1
        width = cols if whole else min(cols - inside, end - at)
        yield Rectangle(at - start, row + first, col + inside, rows, width)
        at += rows * width
