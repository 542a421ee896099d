"""Shapes of parameters that are cut over processes, and where a cut part lies in the whole.

Two cuts may apply, one inside the other: tensor parallelism leaves a process with a `TPShard`
of a parameter, and ZeRO stage 3 leaves it with a slice of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn


@dataclass(frozen=True)
class TPShard:
    """The part of a tensor that one rank of a tensor-parallel group holds.

    Args:
        global_shape: shape of the unsharded tensor.
        dim: the dimension that is cut.
        index: what is held along it: a range of consecutive positions, or int64 positions on the
            CPU, increasing.
        inner: the dimension is the rank r of a low-rank product. Methods see such a parameter
            whole, because every part of the product is made of all of it.
    """

    global_shape: torch.Size
    dim: int
    index: range | torch.Tensor
    inner: bool = False

    @property
    def shape(self) -> torch.Size:
        """Shape of the part."""
        return torch.Size(
            (*self.global_shape[: self.dim], len(self.index), *self.global_shape[self.dim + 1 :])
        )

    def part(self, value: torch.Tensor) -> torch.Tensor:
        """This rank's part of an uncut tensor; a view where the positions are consecutive."""
        if isinstance(self.index, range):
            return value.narrow(self.dim, self.index.start, len(self.index))
        return value.index_select(self.dim, self.index.to(value.device))

    def place(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Write this rank's part to where it belongs in an uncut tensor."""
        if isinstance(self.index, range):
            whole.narrow(self.dim, self.index.start, len(self.index)).copy_(part)
        else:
            whole.index_copy_(self.dim, self.index.to(whole.device), part.to(whole))

    def flat_index(self, start: int, count: int) -> torch.Tensor:
        """Where elements [start, start + count) of the flattened part lie in the flattened whole.

        Returns:
            int64, (count,), on the CPU.
        """
        at = torch.arange(start, start + count)
        behind = self.global_shape[self.dim + 1 :].numel()
        width = len(self.index)
        before, along, rest = at // (behind * width), at // behind % width, at % behind
        positions = along + self.index.start if isinstance(self.index, range) else self.index[along]
        return (before * self.global_shape[self.dim] + positions) * behind + rest


def slice_of(elements: int, rank: int, size: int) -> tuple[int, int]:
    """First element and number of elements of a rank's slice of a flattened parameter.

    Slices are equal but for padding, which is not counted; the last ones may be empty.
    """
    share = -(-elements // size)
    start = min(elements, rank * share)
    return start, min(share, elements - start)


def tp_local_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of what this process's tensor-parallel rank holds, also where ZeRO has cut that."""
    return getattr(parameter, "tp_local_shape", parameter.shape)


def keep_tp_local_shape(parameter: nn.Parameter) -> None:
    """Note a parameter's shape on it, before ZeRO leaves an empty placeholder in its place."""
    cast(Any, parameter).tp_local_shape = parameter.shape


def keeps_tp_local_shape(parameter: nn.Parameter) -> bool:
    """Whether a parameter's shape was noted on it."""
    return hasattr(parameter, "tp_local_shape")


def shard_of(parameter: nn.Parameter) -> TPShard | None:
    """The part that this process's tensor-parallel rank holds; None if it holds the whole."""
    return getattr(parameter, "tp_shard", None)


def inner_shard(parameter: nn.Parameter) -> TPShard | None:
    """The part that this rank holds of a parameter that is cut along r; None for any other."""
    shard = shard_of(parameter)
    return shard if shard is not None and shard.inner else None


def method_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of what methods see here: the rank's part, but whole along r."""
    shard = inner_shard(parameter)
    return tp_local_shape(parameter) if shard is None else shard.global_shape


def global_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, whoever holds it."""
    shard = shard_of(parameter)
    return tp_local_shape(parameter) if shard is None else shard.global_shape


def apply_shard(parameter: nn.Parameter, shard: TPShard) -> None:
    """Leave a shard of a whole parameter in its place, and say so on it."""
    # a copy: a view would keep the whole tensor alive
    parameter.data = shard.part(parameter.data).clone(memory_format=torch.contiguous_format)
    marked = cast(Any, parameter)
    marked.tp_shard = shard
    # DeepSpeed and Megatron count the gradient of any other parameter on the first rank only
    marked.tensor_model_parallel = True
    marked.partition_dim, marked.partition_stride = shard.dim, 1
