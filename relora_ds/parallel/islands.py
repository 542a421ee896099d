"""Islands: equal parts of a job, each a DeepSpeed world of its own, and what connects them.

Neighbouring ranks are of one island. Ranks with the same place in their islands hold the same
slices of the same parameters, so that what islands exchange is never put together first: each such
set of ranks is one group, with one rank per island.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed import ProcessGroup

# torch 2.13 renamed it and warns of the old name
_all_gather: Any = getattr(torch.distributed, "all_gather_single", None) or (
    torch.distributed.all_gather_into_tensor
)


class Awaited:
    """A collective under way between islands.

    Args:
        work: torch's handle of it.
        tensors: where its result is going to be, and what it is made of.
    """

    def __init__(self, work: Any, *tensors: torch.Tensor) -> None:
        self._work, self._tensors = work, tensors

    def result(self) -> torch.Tensor:
        """Wait for the end; the same tensor however often it is asked for."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._tensors[0]


@dataclass(frozen=True)
class Islands:
    """This process's island among all of them.

    Args:
        rank: number of the island.
        size: how many there are.
        group: ranks with the same place in their islands, in the order of these; None where there
            is one island only.
        local: ranks of this island; None for all ranks.
        background: those of `group` once more, for what they exchange while they train; None where
            they do not. It moves tensors of the host: a collective of devices that waits for a slow
            link would keep them from computing.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    local: ProcessGroup | None = None
    background: ProcessGroup | None = None

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over the islands in place, the same bits on each; the tensor is contiguous."""
        if self.size == 1 or not tensor.numel():
            return tensor
        torch.distributed.all_reduce(tensor, group=self.group)
        return tensor.div_(self.size)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every island's (N,) tensor, as (islands, N) in their order."""
        everyone = tensor.new_empty(self.size, *tensor.shape)
        if self.size == 1:
            everyone[0] = tensor
        elif tensor.numel():
            _all_gather(everyone.view(-1), tensor.contiguous(), group=self.group)
        return everyone

    def begin_sum(self, tensor: torch.Tensor) -> Awaited:
        """Begin to add up the islands' (N,) tensors on the host, in place."""
        work = torch.distributed.all_reduce(tensor, group=self.background, async_op=True)
        return Awaited(work, tensor)

    def begin_gather(self, tensor: torch.Tensor) -> Awaited:
        """Begin to collect every island's (N,) tensor on the host, as (islands, N) in their
        order."""
        everyone = tensor.new_empty(self.size, *tensor.shape)
        work = _all_gather(everyone.view(-1), tensor, group=self.background, async_op=True)
        return Awaited(work, everyone, tensor)


ALONE = Islands()
"""One island."""


def join_one_of(
    groups: Iterable[Sequence[int]], rank: int, backend: str | None = None
) -> ProcessGroup:
    """Create disjoint groups and return the one that a rank is in. A collective call.

    Args:
        groups: global ranks, the same on every process; each rank is in one of them.
        rank: of this process.
        backend: of their collectives; by default that of all processes.
    """
    own = None
    for ranks in groups:
        # every rank takes part in creating every group, also of those that it is not in
        group = torch.distributed.new_group(list(ranks), backend=backend)
        own = group if rank in ranks else own
    return cast(ProcessGroup, own)
