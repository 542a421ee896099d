"""Some rows of matrices, copied and cleared for many matrices at once.

Rank vectors are rows or columns of factors, of which a process may hold pieces: each piece is a row
of some strided view. On a GPU one launch moves them all; elsewhere torch does, matrix by matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from relora_ds.numerics.gpu import launch
from relora_ds.numerics.transfers import orderless_writes


class Rows(NamedTuple):
    """Some rows of a matrix."""

    view: torch.Tensor
    """(rows, elements), with any strides; live."""
    numbers: torch.Tensor
    """int64, (k,), without repetition where they are written: which rows. On the CPU where kernels
    are `launch.usable` on the view's device, beside the view elsewhere."""


Move = tuple[Rows, Rows]
"""A target and a source: as many rows of equal length."""


def copy_rows(moves: Sequence[Move], device: torch.device) -> None:
    """Copy rows, each to its target, converted to the target's type. The host does not wait.

    Args:
        moves: on the device. No element is written twice, and none is written that is also read.
        device: where all of them are.
    """
    if launch.usable(device):
        from relora_ds.numerics.gpu import rows as kernels  # needs Triton

        return kernels.copy_rows(moves, device)
    with orderless_writes():
        for target, source in moves:
            target.view[target.numbers] = source.view[source.numbers].to(target.view.dtype)


def copy_matrices(moves: Sequence[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> None:
    """Copy matrices of one device, each from the second to the first. The host does not wait."""
    if not launch.usable(device):
        for target, source in moves:
            target.copy_(source)
        return
    numbers = [torch.arange(len(source)) for _, source in moves]
    copy_rows(
        [(Rows(to, n), Rows(of, n)) for (to, of), n in zip(moves, numbers, strict=True)], device
    )


def move_rows(moves: Sequence[Move], device: torch.device) -> None:
    """Copy rows between a device and memory of the host, without waiting.

    Kernels reach into pinned memory by themselves; otherwise every row is a copy of its own.

    Args:
        moves: of one type, with numbers of rows on the CPU; no element is written twice, and none
            is written that is also read.
        device: where one side of each is.
    """
    near: list[Move] = []
    kernels = launch.usable(device)
    for move in moves:
        if kernels and all(_within_reach(rows.view, device) for rows in move):
            near.append(move)
            continue
        target, source = move
        for to, of in zip(target.numbers.tolist(), source.numbers.tolist(), strict=True):
            target.view[to].copy_(source.view[of], non_blocking=True)
    if near:
        copy_rows(near, device)


def _within_reach(tensor: torch.Tensor, device: torch.device) -> bool:
    return tensor.device == device or tensor.is_pinned()


def clear_rows(rows: Sequence[Rows], device: torch.device) -> None:
    """Set rows to zero. The host does not wait.

    Args:
        rows: of matrices on the device.
        device: where all of them are.
    """
    if launch.usable(device):
        from relora_ds.numerics.gpu import rows as kernels  # needs Triton

        return kernels.clear_rows(rows)
    with orderless_writes():
        for view, numbers in rows:
            view.index_fill_(0, numbers, 0)
