"""`TrainState` on top of a layout: what methods may do to a partitioned run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple

import torch
from torch import nn

from relora_ds.accounting.recorder import recorder
from relora_ds.engine.zero.fragments import fragment_of
from relora_ds.engine.zero.inner_factors import join_inner, lay_out_wire
from relora_ds.engine.zero.layout import Layout
from relora_ds.engine.zero.node_memory import NodeMemory
from relora_ds.engine.zero.order_statistic import order_statistics
from relora_ds.methods.train_state import MomentShard, TrainState
from relora_ds.numerics.base_weight import (
    BaseWeight,
    WeightEdit,
    add_product,
    apply_product,
    weight_times,
)
from relora_ds.optim.vector_adamw import MOMENTS
from relora_ds.optim.vector_clock import Fragment, Stretch, VectorClock
from relora_ds.parallel.shape import (
    global_shape,
    inner_shard,
    method_shape,
    shard_of,
    slice_of,
    tp_local_shape,
)
from relora_ds.parallel.tensor import SINGLE, TensorParallel

Probe = Callable[[], torch.Tensor | None]


class ZeroState(TrainState):
    """Weights, masters and moments, whole or sliced, wherever the layout says they are.

    Args:
        layout: where working weights, masters and moments are.
        bases: authoritative store of every frozen weight that may be edited.
        clocks: clock of every parameter that has one.
        completed_steps: the optimizer's own count of updates.
        probe: output of the model on a fixed batch.
        edited: called with every frozen weight that was edited.
        tp: the tensor-parallel group whose ranks hold other parts.
    """

    def __init__(
        self,
        layout: Layout,
        bases: Mapping[nn.Parameter, BaseWeight],
        clocks: Mapping[nn.Parameter, VectorClock],
        completed_steps: Callable[[], int],
        probe: Probe,
        edited: Callable[[nn.Parameter], None] = lambda weight: None,
        tp: TensorParallel = SINGLE,
    ) -> None:
        self._tp = tp
        self._layout = layout
        self._bases = bases
        self._clocks = clocks
        self._completed_steps = completed_steps
        self._probe = probe
        self._node_memory: NodeMemory | None = None
        self._edited = edited
        self.bytes_moved = 0

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return global_shape(parameter)

    def gather(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        values = self._layout.gather(parameters)
        if self._layout.weights_sharded:
            # what is kept whole was not gathered; it counts, so that the figure is an upper bound
            self.bytes_moved += sum(v.numel() * v.element_size() for v in values)
        joined, moved = join_inner(values, parameters, self._tp)
        self.bytes_moved += moved
        return joined

    def moments(self, parameter: nn.Parameter) -> MomentShard | None:
        first = self._layout.optimizer_state(parameter, "exp_avg")
        second = self._layout.optimizer_state(parameter, "exp_avg_sq")
        if first is None or second is None:
            return None
        shard = shard_of(parameter)
        counted = shard is not None or self._tp.rank == 0
        start = self._layout.placements[parameter].stretch.start
        return MomentShard(start, first, second, shard, counted)

    def write(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        assert value.shape == method_shape(parameter), (value.shape, method_shape(parameter))
        shard = inner_shard(parameter)
        value = value if shard is None else shard.part(value)
        placement = self._layout.placements[parameter]
        stretch, flat = placement.stretch, value.reshape(-1)
        # both, or the next step undoes one of them: the master overwrites the working copy
        placement.master().copy_(flat[stretch.start : stretch.start + stretch.length])
        start, working = self._layout.working(parameter)
        working.copy_(flat[start : start + working.numel()])
        self._layout.write_copies(parameter, value)

    def add_product(
        self,
        weight: nn.Parameter,
        left: torch.Tensor,
        right: torch.Tensor,
        scale: float,
        measured: bool = True,
    ) -> WeightEdit | None:
        start, working = self._layout.working(weight)
        add = add_product if measured else apply_product
        edit = add(self._bases[weight], working, start, left, right, scale)
        self._layout.drop_copies(weight)
        self._edited(weight)
        return edit

    def weight_times(self, weight: nn.Parameter, right: torch.Tensor) -> torch.Tensor:
        start, working = self._layout.working(weight)
        out = weight_times(self._bases[weight], working, start, tp_local_shape(weight)[0], right)
        if self._layout.weights_sharded:
            self._sum(out)
        return out

    def total_edits(self, edits: Sequence[WeightEdit]) -> list[WeightEdit]:
        if not self._layout.weights_sharded and self._tp.size == 1:
            return list(edits)
        figures = torch.tensor([astuple(edit) for edit in edits], dtype=torch.float64)
        figures = figures.to(self._device())
        if self._layout.weights_sharded:
            self._sum(figures)
        self.sum_over_parts(figures)
        return [WeightEdit(int(row[0]), *row[1:]) for row in figures.tolist()]

    def order_statistics(
        self, values: Sequence[torch.Tensor], ranks: Sequence[int]
    ) -> list[torch.Tensor]:
        return order_statistics(values, ranks, self._sum_moments, self._device())

    def total(self, counts: Sequence[int]) -> list[int]:
        tensor = torch.tensor(counts, dtype=torch.int64, device=self._device())
        self._sum_moments(tensor)
        return tensor.tolist()

    def sum_over_parts(self, value: torch.Tensor) -> torch.Tensor:
        if self._tp.size > 1:
            self._tp.sum(value)
            self.bytes_moved += value.numel() * value.element_size()
        return value

    def _sum_moments(self, tensor: torch.Tensor) -> None:
        """Over all ranks that hold moments; the caller leaves out all copies but one."""
        self._sum(tensor)
        self.sum_over_parts(tensor)

    def reset_steps(self, parameter: nn.Parameter) -> int:
        clock = self._clocks[parameter]
        clock.restart(self._completed_steps())
        return clock.count

    def live_vectors(self, parameter: nn.Parameter, ahead: int = 0) -> torch.Tensor:
        return self._clocks[parameter].live(self._completed_steps() + ahead)

    def gather_vectors(
        self,
        factors: Sequence[tuple[nn.Parameter, torch.Tensor]],
        stored: Sequence[tuple[int, torch.Tensor]] = (),
    ) -> list[torch.Tensor]:
        spread = any(inner_shard(factor) is not None for factor, _ in factors)
        if not self._layout.weights_sharded and not spread:
            found = [self._own_vectors(factor, index) for factor, index in factors]
            return [*found, *(part for _, part in stored)]
        return self._exchange(factors, stored)

    def _own_vectors(self, factor: nn.Parameter, index: torch.Tensor) -> torch.Tensor:
        axis = self._clocks[factor].axis
        vectors = factor.detach().index_select(axis, index.to(factor.device))
        return vectors if axis == 0 else vectors.t().contiguous()

    def _exchange(
        self,
        factors: Sequence[tuple[nn.Parameter, torch.Tensor]],
        stored: Sequence[tuple[int, torch.Tensor]],
    ) -> list[torch.Tensor]:
        """Sums of what every rank has, zeros elsewhere: exact, as no element is on two ranks.

        One sum over the ranks that ZeRO cuts for, and one over those that cut vectors along r.
        """
        axes = [self._clocks[factor].axis for factor, _ in factors]
        shapes = [
            (len(index), tp_local_shape(factor)[1 - axis])
            for (factor, index), axis in zip(factors, axes, strict=True)
        ]
        shapes += [(len(part), length) for length, part in stored]
        spread = [inner_shard(factor) is not None for factor, _ in factors]
        spread += [False] * len(stored)
        like = torch.empty(0, dtype=factors[0][0].dtype, device=self._device())
        wire, front, parts = lay_out_wire(shapes, spread, like)
        for out, (factor, index) in zip(parts, factors, strict=False):
            start, working = self._layout.working(factor)
            fragment = self._fragment(factor, Stretch(start, 0, working.numel()))
            for part in fragment.vectors(working, index):
                out[part.asked, part.span] = part.view[part.local]
        for out, (length, part) in zip(parts[len(factors) :], stored, strict=True):
            out[:, slice(*self.own_span(length))] = part
        if self._layout.weights_sharded:
            self._sum(wire)
        if front.numel():
            self.sum_over_parts(front)
        return parts

    def write_vectors(
        self, parameter: nn.Parameter, index: torch.Tensor, values: torch.Tensor
    ) -> None:
        placement = self._layout.placements[parameter]
        start, working = self._layout.working(parameter)
        stretch, master = placement.stretch, placement.owner.detach().view(-1)
        targets = [(master, self._fragment(parameter, stretch))]
        if master.data_ptr() != working.data_ptr():
            here = Stretch(start, 0, working.numel())
            targets.append((working, self._fragment(parameter, here)))
        for flat, fragment in targets:
            for part in fragment.vectors(flat, index):
                part.view[part.local] = values[part.asked, part.span].to(flat)
        self._layout.drop_copies(parameter)

    def reset_vectors(self, parameter: nn.Parameter, index: torch.Tensor, frozen: int) -> int:
        clock, completed = self._clocks[parameter], self._completed_steps()
        placement, cleared = self._layout.placements[parameter], 0
        state = self._layout.optimizer.state.get(placement.owner, {})
        fragment = self._fragment(parameter, placement.stretch)
        for key in MOMENTS:
            if key in state:
                for part in fragment.vectors(state[key].view(-1), index):
                    part.view[part.local] = 0.0
                    cleared += len(part.local) * part.view.shape[1]
        clock.restart(completed, index)
        clock.freeze(completed + frozen, index)
        return cleared

    def _fragment(self, parameter: nn.Parameter, stretch: Stretch) -> Fragment:
        return fragment_of(parameter, stretch, self._clocks[parameter])

    def own_span(self, length: int) -> tuple[int, int]:
        if not self._layout.weights_sharded:
            return 0, length
        group = self._layout.partition_group
        size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        start, count = slice_of(length, rank, size)
        return start, start + count

    def node_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._memory().tensor(shape, dtype)

    def writes_node(self) -> bool:
        return self._memory().is_writer

    def node_bytes(self) -> int:
        return 0 if self._node_memory is None else self._node_memory.bytes_on_node

    def _memory(self) -> NodeMemory:
        if self._node_memory is None:
            shared = not self._layout.weights_sharded
            self._node_memory = NodeMemory(shared, part=self._tp.rank)
        return self._node_memory

    def collect(self, part: torch.Tensor, length: int) -> torch.Tensor | None:
        is_main = torch.distributed.get_rank(self._tp.data_group) == 0
        if self._layout.weights_sharded:
            whole = torch.zeros(len(part), length, dtype=part.dtype, device=self._device())
            whole[:, slice(*self.own_span(length))] = part.to(whole.device)
            self._sum(whole)
            part = whole
        return part.cpu() if is_main else None

    def probe(self) -> torch.Tensor | None:
        with recorder.phase("eval"):
            return self._probe()

    def _sum(self, tensor: torch.Tensor) -> None:
        """Over the ranks that hold different parts of the moments; replicated ones count once."""
        if self._layout.partition_group is not None:
            torch.distributed.all_reduce(tensor, group=self._layout.partition_group)
            self.bytes_moved += tensor.numel() * tensor.element_size()

    def _device(self) -> torch.device:
        """Where collectives take their tensors: with the parameters, also if moments are not."""
        return next(iter((*self._layout.placements, *self._bases))).device
