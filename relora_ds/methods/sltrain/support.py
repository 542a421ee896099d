"""Where the sparse part of a projection has its elements: a fixed random set of positions.

A support is a pure function of (seed, projection, shape, size), so that every process, stage and
resumed run draws the same one without talking to another.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

from relora_ds.randomness import Stream

_NARROW = 1 << 15  # columns of wider projections do not fit into int16


def support_size(rows: int, cols: int, sparsity: float) -> int:
    """floor(sparsity * rows * cols), where the sparsity is the decimal number that was written.

    In floating point 0.29 * 100 is less than 29.
    """
    return int(Fraction(repr(sparsity)) * rows * cols)


def column_type(cols: int) -> torch.dtype:
    """The narrowest integer that holds a column index."""
    return torch.int16 if cols <= _NARROW else torch.int32


def draw_support(
    seed: int, name: str, rows: int, cols: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` distinct positions of a (rows, cols) matrix, uniform over all of them, in CSR order.

    They are the first images of a random permutation that is evaluated index by index: memory is
    that of the support, never that of the matrix.

    Args:
        name: full name of the projection.

    Returns:
        Row starts, int32 (rows + 1,), and columns, int16 or int32 (count,), increasing within
        each row; on the CPU.
    """
    flat = Stream(seed, "support", name).permutation(rows * cols)(np.arange(count))
    flat.sort()
    starts = np.searchsorted(flat, np.arange(rows + 1) * cols)
    columns = torch.from_numpy(flat % cols).to(column_type(cols))
    return torch.from_numpy(starts).to(torch.int32), columns


def flat_positions(row_starts: torch.Tensor, columns: torch.Tensor, cols: int) -> torch.Tensor:
    """Positions in the flattened matrix, (count,), increasing; int32 where that is enough."""
    rows, count = row_starts.numel() - 1, columns.numel()
    wide = torch.int32 if rows * cols < 2**31 else torch.int64
    index = torch.arange(rows, dtype=wide, device=columns.device)
    # the size is given: on a GPU it would have to be read back
    by_element = torch.repeat_interleave(index, row_starts.diff(), output_size=count)
    return by_element.mul_(cols).add_(columns)
