"""Rows of strided matrices, copied and cleared by one launch for all matrices of a type.

A row is a job of a table. A column is a row of the transposed view: its elements lie apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from relora_ds.numerics.gpu import launch
from relora_ds.numerics.gpu.types import TYPES, converted

_BLOCK = 1024

Rows = tuple[torch.Tensor, torch.Tensor]
"""A view (rows, elements) with any strides, and numbers of some of its rows, int64 on the CPU."""


@triton.jit
def copy_row(
    table,  # (jobs, 5): target, its stride, source, its stride, length
    target_type: tl.constexpr,
    source_type: tl.constexpr,
    block: tl.constexpr,
):
    job = table + tl.program_id(0).to(tl.int64) * 5
    target = tl.load(job).to(tl.pointer_type(target_type))
    source = tl.load(job + 2).to(tl.pointer_type(source_type))
    at = tl.program_id(1).to(tl.int64) * block + tl.arange(0, block)
    inside = at < tl.load(job + 4)
    values = tl.load(source + at * tl.load(job + 3), mask=inside)
    tl.store(target + at * tl.load(job + 1), converted(values, target_type), mask=inside)


@triton.jit
def clear_row(
    table,  # (jobs, 3): target, its stride, length
    target_type: tl.constexpr,
    block: tl.constexpr,
):
    job = table + tl.program_id(0).to(tl.int64) * 3
    target = tl.load(job).to(tl.pointer_type(target_type))
    at = tl.program_id(1).to(tl.int64) * block + tl.arange(0, block)
    zeros = tl.full([block], 0, target_type)
    tl.store(target + at * tl.load(job + 1), zeros, mask=at < tl.load(job + 2))


def copy_rows(moves: Sequence[tuple[Rows, Rows]], device: torch.device) -> None:
    """Copy rows, each to its target, converted to the target's type.

    Args:
        moves: targets and sources; as many rows of equal length. No element is written twice, and
            none is written that is also read.
        device: where all of them are, or can be reached from.
    """
    jobs: dict[tuple[torch.dtype, torch.dtype], list[np.ndarray]] = {}
    for target, source in moves:
        length = target[0].shape[1]
        assert length == source[0].shape[1], (target[0].shape, source[0].shape)
        columns = (*_places(target), *_places(source), np.full(len(target[1]), length))
        kinds = target[0].dtype, source[0].dtype
        jobs.setdefault(kinds, []).append(np.stack(np.broadcast_arrays(*columns), axis=1))
    tables = [np.concatenate(each) for each in jobs.values()]
    for kinds, table, sent in zip(jobs, tables, _sent(tables, device), strict=True):
        grid = len(table), -(-int(table[:, 4].max(initial=0)) // _BLOCK)
        launch.start(copy_row, grid, sent, *(TYPES[kind] for kind in kinds), _BLOCK)


def clear_rows(rows: Sequence[Rows]) -> None:
    """Set rows to zero, all of one device.

    Args:
        rows: of any types.
    """
    jobs: dict[torch.dtype, list[np.ndarray]] = {}
    for each in rows:
        view, numbers = each
        columns = (*_places(each), np.full(len(numbers), view.shape[1]))
        jobs.setdefault(view.dtype, []).append(np.stack(np.broadcast_arrays(*columns), axis=1))
    if not jobs:
        return
    tables = [np.concatenate(each) for each in jobs.values()]
    device = rows[0][0].device
    for kind, table, sent in zip(jobs, tables, _sent(tables, device), strict=True):
        grid = len(table), -(-int(table[:, 2].max(initial=0)) // _BLOCK)
        launch.start(clear_row, grid, sent, TYPES[kind], _BLOCK)


def _places(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Addresses of the first elements of rows, and how far apart their elements are."""
    view, numbers = rows
    apart, within = view.stride()
    first = view.data_ptr() + numbers.numpy() * (apart * view.element_size())
    return first, np.array(within)


def _sent(tables: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    return launch.send_tables(tables, device) if tables else []
