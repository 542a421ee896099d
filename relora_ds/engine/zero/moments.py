"""Adam's moments on top of a layout: the port `Moments`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from relora_ds.engine.zero.collectives import StateCollectives
from relora_ds.engine.zero.layout import Layout
from relora_ds.methods.train_state import Moments, MomentShard
from relora_ds.numerics.order_statistic import order_statistics
from relora_ds.optim.vector_clock import VectorClock
from relora_ds.parallel.shape import global_shape, shard_of


class ZeroMoments(Moments):
    """The slices of both moments that the optimizer keeps on this rank.

    Args:
        layout: where moments are.
        clocks: clock of every parameter that has one.
        completed_steps: the optimizer's own count of updates.
        collectives: sums over the ranks that hold other parts.
    """

    def __init__(
        self,
        layout: Layout,
        clocks: Mapping[nn.Parameter, VectorClock],
        completed_steps: Callable[[], int],
        collectives: StateCollectives,
    ) -> None:
        self._layout = layout
        self._clocks = clocks
        self._completed_steps = completed_steps
        self._collectives = collectives

    @property
    def updates(self) -> int:
        return self._completed_steps()

    def shard(self, parameter: nn.Parameter) -> MomentShard | None:
        first = self._layout.optimizer_state(parameter, "exp_avg")
        second = self._layout.optimizer_state(parameter, "exp_avg_sq")
        if first is None or second is None:
            return None
        start = self._layout.placements[parameter].stretch.start
        return MomentShard(start, first, second, shard_of(parameter))

    def count_non_zero(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        shards = [self._counted(parameter) for parameter in parameters]
        device = self._collectives.device
        total = torch.zeros((), dtype=torch.int64, device=device)
        for shard in shards:
            if shard is not None:
                here = shard.exp_avg.count_nonzero() + shard.exp_avg_sq.count_nonzero()
                total += here.to(device)
        return self._collectives.sum_over_state(total)

    def order_statistics(
        self, parameters: Sequence[nn.Parameter], ks: Sequence[int]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        sizes = [global_shape(parameter).numel() for parameter in parameters]
        inside = all(0 < k <= size for k, size in zip(ks, sizes, strict=True))
        assert inside, f"k beyond the size of a parameter: {ks} of {sizes}"
        values = []
        for parameter in parameters:
            shard = self._counted(parameter)
            empty = torch.empty(0, device=self._collectives.device)
            values += [empty, empty] if shard is None else [shard.exp_avg, shard.exp_avg_sq]
        both = [k for k in ks for _ in range(2)]
        sums = self._collectives
        found = order_statistics(values, both, sums.sum_over_state, sums.device)
        return list(zip(found[::2], found[1::2], strict=True))

    def _counted(self, parameter: nn.Parameter) -> MomentShard | None:
        """The shard, but None for all of several identical copies except one."""
        copies = shard_of(parameter) is None and self._collectives.tp.rank != 0
        return None if copies else self.shard(parameter)

    def restart(self, parameter: nn.Parameter) -> int:
        clock = self._clocks[parameter]
        clock.restart(self._completed_steps())
        return clock.count
