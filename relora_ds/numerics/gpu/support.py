"""Elements of a dense matrix at the support of a sparse one, added to and read; CSR as it is.

A row is a program: its positions are read once, in the narrow type that they are kept in, and no
table of flat positions is made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from relora_ds.numerics.gpu import launch
from relora_ds.numerics.gpu.types import converted

_BLOCK = 128  # a row of a few thousand columns has some hundred elements


@triton.jit
def add_row(dense, row_starts, columns, values, width, block: tl.constexpr):
    row = tl.program_id(0)
    end = tl.load(row_starts + row + 1)
    line = dense + row.to(tl.int64) * width
    for first in range(tl.load(row_starts + row), end, block):
        at = first + tl.arange(0, block)
        place = line + tl.load(columns + at, mask=at < end, other=0)
        added = tl.load(values + at, mask=at < end, other=0.0).to(tl.float32)
        total = tl.load(place, mask=at < end, other=0.0).to(tl.float32) + added
        tl.store(place, converted(total, dense.dtype.element_ty), mask=at < end)


@triton.jit
def read_row(dense, row_starts, columns, values, width, block: tl.constexpr):
    row = tl.program_id(0)
    end = tl.load(row_starts + row + 1)
    line = dense + row.to(tl.int64) * width
    for first in range(tl.load(row_starts + row), end, block):
        at = first + tl.arange(0, block)
        place = line + tl.load(columns + at, mask=at < end, other=0)
        tl.store(values + at, tl.load(place, mask=at < end, other=0.0), mask=at < end)


def add_at(
    dense: torch.Tensor, row_starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> None:
    """dense (m, n), contiguous, += values (nnz,) at their positions; each sum is rounded once."""
    assert dense.is_contiguous()
    grid, width = (row_starts.numel() - 1,), dense.shape[1]  # dense may have further rows
    launch.start(add_row, grid, dense, row_starts, columns, values, width, _BLOCK, num_warps=1)


def read_at(dense: torch.Tensor, row_starts: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Elements (nnz,) of dense (m, n), contiguous, at some positions."""
    assert dense.is_contiguous()
    values = dense.new_empty(columns.shape)
    grid, width = (row_starts.numel() - 1,), dense.shape[1]
    launch.start(read_row, grid, dense, row_starts, columns, values, width, _BLOCK, num_warps=1)
    return values
