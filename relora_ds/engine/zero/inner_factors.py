"""Factors that tensor parallelism cuts along the rank dimension, as methods see them: whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from relora_ds.parallel.shape import inner_shard
from relora_ds.parallel.tensor import TensorParallel


def join_inner(
    values: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter], tp: TensorParallel
) -> tuple[list[torch.Tensor], int]:
    """Whole values along r from the ranks' parts, by one all-gather for all of them.

    Args:
        values: of the parameters, as this rank holds them.

    Returns:
        The values, those of other parameters as they are, and the payload in bytes.
    """
    found = list(values)
    cut = [(n, shard) for n, p in enumerate(parameters) if (shard := inner_shard(p)) is not None]
    if not cut:
        return found, 0
    everyone = tp.join(torch.cat([found[n].reshape(-1) for n, _ in cut]), 0)
    by_rank = everyone.view(tp.size, -1)
    parts = by_rank.split([found[n].numel() for n, _ in cut], dim=1)
    for (number, shard), part in zip(cut, parts, strict=True):
        shape = tp.size, *found[number].shape
        found[number] = torch.cat(part.reshape(shape).unbind(), dim=shard.dim)
    return found, everyone.numel() * everyone.element_size()


def lay_out_wire(
    shapes: Sequence[tuple[int, int]], spread: Sequence[bool], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Zeros for matrices that lie one behind the other, so that one collective moves them all.

    Args:
        shapes: of the matrices.
        spread: which of them lie in front.
        like: a tensor of the dtype and on the device.

    Returns:
        All of them and those in front, as 1-D views, and the matrices in the order of their shapes.
    """
    order = sorted(range(len(shapes)), key=lambda number: not spread[number])
    sizes = [shapes[number][0] * shapes[number][1] for number in order]
    flat = like.new_zeros(sum(sizes))
    views = dict(zip(order, flat.split(sizes), strict=True))
    front = flat[: sum(sizes[: sum(spread)])]
    return flat, front, [views[number].view(shape) for number, shape in enumerate(shapes)]
