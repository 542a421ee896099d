"""Moments on top of a layout: the port `Moments`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.engine.zero.collectives import StateCollectives
from relora_ds.engine.zero.layout import Layout
from relora_ds.methods.train_state import Moments, MomentShard
from relora_ds.numerics.order_statistic import order_statistics
from relora_ds.optim.vector_adamw import MOMENTS
from relora_ds.optim.vector_clock import VectorClock
from relora_ds.parallel.shape import global_shape, shard_of

MatrixMoments = Mapping[nn.Parameter, tuple[torch.Tensor, ...]]
"""Moments of parameters that are updated matrix-wise: this rank's slices, live and 1-D."""


@dataclass(frozen=True)
class OptimizerSlices:
    """What the optimizer keeps on this rank, and how far it is.

    Args:
        layout: where Adam's moments are.
        clocks: clock of every parameter that has one.
        completed_steps: the optimizer's own count of updates.
        by_matrix: moments of parameters that are updated matrix-wise.
    """

    layout: Layout
    clocks: Mapping[nn.Parameter, VectorClock]
    completed_steps: Callable[[], int]
    by_matrix: MatrixMoments = field(default_factory=dict)


class _RotatedRows:
    """The rows of both moments that a slice touches, carried over to another basis.

    What the slice holds of a row is padded with zeros: the rotated row is the sum over all slices
    that hold something of it.

    Args:
        shard: this rank's slice of the moments of a parameter (L, r).
        rotation: C (r, r), fp32.
    """

    def __init__(self, shard: MomentShard, rotation: torch.Tensor) -> None:
        self._shard, width = shard, len(rotation)
        count, device = shard.exp_avg.numel(), shard.exp_avg.device
        self._first, self._before = divmod(shard.start, width)
        rows = -(-(self._before + count) // width)
        behind = rows * width - self._before - count
        turn = rotation.to(device, torch.float32)
        self._parts = [
            F.pad(moment.float(), (self._before, behind)).view(rows, width) @ by
            for moment, by in ((shard.exp_avg, turn), (shard.exp_avg_sq, turn.square()))
        ]
        first = [0] if self._before else []
        last = [rows - 1] if behind and (rows > 1 or not first) else []
        self._cut = first + last

    def cut_rows(self) -> list[tuple[int, torch.Tensor]]:
        """Number in the parameter and both rotated parts, (2 r,), of rows that the slice cuts."""
        return [
            (self._first + at, torch.cat([part[at] for part in self._parts])) for at in self._cut
        ]

    def complete(self, everyone: Sequence[torch.Tensor]) -> None:
        """Add up what all ranks hold of the rows that the slice cuts.

        Args:
            everyone: by rank, (2, 1 + 2 r): numbers and parts of the rows that its slice cuts.
        """
        ends = torch.cat(list(everyone))
        for at in self._cut:
            # zeros and not a choice, the size of which the host would wait for
            whole = torch.where(ends[:, :1] == self._first + at, ends[:, 1:], 0.0).sum(0)
            for part, value in zip(self._parts, whole.chunk(2), strict=True):
                part[at] = value.to(part)

    def store(self) -> None:
        """Write the slice's elements back."""
        count = self._shard.exp_avg.numel()
        for moment, part in zip(
            (self._shard.exp_avg, self._shard.exp_avg_sq), self._parts, strict=True
        ):
            moment.copy_(part.reshape(-1)[self._before : self._before + count])


class ZeroMoments(Moments):
    """The slices of all moments that the optimizer keeps on this rank.

    Args:
        slices: what the optimizer keeps here.
        collectives: sums over the ranks that hold other parts.
    """

    def __init__(self, slices: OptimizerSlices, collectives: StateCollectives) -> None:
        self._slices = slices
        self._layout = slices.layout
        self._collectives = collectives

    @property
    def updates(self) -> int:
        return self._slices.completed_steps()

    def shard(self, parameter: nn.Parameter) -> MomentShard | None:
        stretch = self._layout.placements[parameter].stretch
        if (held := self._slices.by_matrix.get(parameter)) is None:
            adam = [self._layout.optimizer_state(parameter, key) for key in MOMENTS]
            held = tuple(moment for moment in adam if moment is not None)
        elif not stretch.length:
            return None
        return MomentShard(stretch.start, held, shard_of(parameter)) if held else None

    def count_non_zero(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        shards = [self._counted(parameter) for parameter in parameters]
        device = self._collectives.device
        total = torch.zeros((), dtype=torch.int64, device=device)
        for shard in shards:
            if shard is not None:
                for moment in shard.moments:
                    total += moment.count_nonzero().to(device)
        return self._collectives.sum_over_state(total)

    def order_statistics(
        self, parameters: Sequence[nn.Parameter], ks: Sequence[int]
    ) -> list[tuple[torch.Tensor, ...]]:
        sizes = [global_shape(parameter).numel() for parameter in parameters]
        inside = all(0 < k <= size for k, size in zip(ks, sizes, strict=True))
        assert inside, f"k beyond the size of a parameter: {ks} of {sizes}"
        values, each = [], []
        counts = [self._count(parameter) for parameter in parameters]
        for parameter, k, count in zip(parameters, ks, counts, strict=True):
            shard = self._counted(parameter)
            empty = torch.empty(0, device=self._collectives.device)
            values += [empty] * count if shard is None else shard.moments
            each += [k] * count
        sums = self._collectives
        found = iter(order_statistics(values, each, sums.sum_over_state, sums.device))
        return [tuple(islice(found, count)) for count in counts]

    def _count(self, parameter: nn.Parameter) -> int:
        """How many moments a parameter has, also where this rank has nothing of it."""
        return len(self._slices.by_matrix.get(parameter, MOMENTS))

    def rotate(self, rotations: Mapping[nn.Parameter, torch.Tensor]) -> None:
        found, cut = {}, []
        for number, (parameter, rotation) in enumerate(rotations.items()):
            shard = self.shard(parameter)
            rows = None if shard is None else _RotatedRows(shard, rotation)
            found[number] = rows
            device = self._layout.placements[parameter].owner.device
            cut.append(self._ends(rows, len(rotation), device))
        if not cut:
            return
        everyone = self._everyones(cut)
        for number, rows in found.items():
            if rows is not None:
                rows.complete([ends[number] for ends in everyone])
                rows.store()

    def _ends(self, rows: _RotatedRows | None, r: int, device: torch.device) -> torch.Tensor:
        """First and last rotated row of this rank's slice, each behind its number in the parameter,
        (2, 1 + 2 r), fp64; a number of -1 says that there is no such row, or that no slice cuts
        it."""
        ends = torch.zeros(2, 1 + 2 * r, dtype=torch.float64, device=device)
        ends[:, :1].fill_(-1)
        if rows is not None:
            for place, (row, values) in enumerate(rows.cut_rows()):
                ends[place, :1].fill_(row)
                ends[place, 1:].copy_(values)
        return ends.flatten()

    def _everyones(self, mine: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """By rank that holds a slice of the state, and by parameter: its `_ends`."""
        group = self._layout.partition_group
        if group is None:
            return [[each.view(2, -1) for each in mine]]
        size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        flat, device = torch.cat(list(mine)), self._collectives.device
        buffer = torch.zeros(size, flat.numel(), dtype=flat.dtype, device=device)
        buffer[rank].copy_(flat)
        # every element is non-zero on one rank at most, so the sum is exact
        summed = self._collectives.sum_over_slices(buffer).to(flat.device)
        sizes = [each.numel() for each in mine]
        return [[part.view(2, -1) for part in flat.split(sizes)] for flat in summed]

    def _counted(self, parameter: nn.Parameter) -> MomentShard | None:
        """The shard, but None for all of several identical copies except one."""
        copies = shard_of(parameter) is None and self._collectives.tp.rank != 0
        return None if copies else self.shard(parameter)

    def restart(self, parameter: nn.Parameter) -> int:
        clock = self._slices.clocks[parameter]
        clock.restart(self._slices.completed_steps())
        return clock.count
