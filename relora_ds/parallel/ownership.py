"""Which rank owns a matrix that several ranks hold slices of. Pure.

The owner holds what one rank holds of its state, and makes it whole where that is asked for. It is
the rank with the largest slice, so that little travels: where ZeRO slices a group of parameters as
one flat tensor, most matrices lie on one rank whole. Where slices are alike the work is shared out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from relora_ds.parallel.shape import global_shape, shard_of, slice_of, tp_local_shape

# every rank's part is aligned to the 4 bytes that NCCL wants, for 2-byte elements
_ALIGNMENT = 2


def owners_of(
    units: Iterable[Sequence[nn.Parameter]],
    slices: Sequence[Sequence[int]],
    tp_size: int = 1,
) -> list[tuple[int, int]]:
    """Owner of each unit: its rank among those that ZeRO slices over, and its tensor rank.

    Args:
        units: matrices that have one owner, in the order in which every rank has them.
        slices: of each unit, the elements that each rank of ZeRO's group holds.
        tp_size: tensor-parallel processes; of units in which they shard nothing each one has an
            owner of its own.
    """
    load: dict[tuple[int, int], int] = {}
    owners = []
    for unit, lengths in zip(units, slices, strict=True):
        shards = tp_size if any(shard_of(matrix) is not None for matrix in unit) else 1
        most = max(lengths)
        able = [rank for rank, length in enumerate(lengths) if length == most]
        places = [(rank, shard) for rank in able for shard in range(shards)]
        owner = min(places, key=lambda place: load.get(place, 0))
        # what most functions of a matrix cost: products with its smaller side
        shapes = [global_shape(matrix) for matrix in unit]
        load[owner] = load.get(owner, 0) + sum(shape.numel() * min(shape) for shape in shapes)
        owners.append(owner)
    return owners


def padded(elements: int, size: int) -> int:
    """Elements of a flat optimizer group after DeepSpeed padded it for `size` equal parts."""
    unit = _ALIGNMENT * size
    return -(-elements // unit) * unit


def slices_of_groups(
    groups: Sequence[Sequence[nn.Parameter]], stage: int, size: int
) -> dict[nn.Parameter, list[int]]:
    """Elements that each rank holds of the optimizer state of every trained parameter.

    Args:
        groups: parameters by optimizer group, in their order.
        stage: ZeRO's. At 1 and 2 a group is one flat tensor that is cut into equal parts, at 3
            every parameter is; at 0 nothing is cut.
        size: ranks that ZeRO slices over.
    """
    found: dict[nn.Parameter, list[int]] = {}
    for group in groups:
        start, total = 0, sum(tp_local_shape(p).numel() for p in group)
        part = padded(total, size) // size
        for parameter in group:
            count = tp_local_shape(parameter).numel()
            if stage == 0:
                found[parameter] = [count] * size
            elif stage == 3:
                found[parameter] = [slice_of(count, rank, size)[1] for rank in range(size)]
            else:
                stop = start + count
                found[parameter] = [
                    max(0, min(stop, (rank + 1) * part) - max(start, rank * part))
                    for rank in range(size)
                ]
            start += count
    return found
