"""Single vectors of clocked parameters on top of a layout: the port `Vectors`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from relora_ds.engine.zero.collectives import StateCollectives
from relora_ds.engine.zero.fragments import fragment_of
from relora_ds.engine.zero.layout import Layout
from relora_ds.methods.train_state import HostMemory, Vectors
from relora_ds.numerics.indexing import distinct_places, upload
from relora_ds.optim.vector_adamw import MOMENTS
from relora_ds.optim.vector_clock import Fragment, Stretch, VectorClock
from relora_ds.parallel.shape import inner_shard, tp_local_shape


class ZeroVectors(Vectors):
    """Rows and columns of factors, whole or in pieces, wherever the layout says they are.

    Args:
        layout: where working weights, masters and moments are.
        clocks: clock of every parameter that has one.
        completed_steps: the optimizer's own count of updates.
        host: knows which span of a stored vector is kept here.
        collectives: sums over the ranks that hold other parts.
    """

    def __init__(
        self,
        layout: Layout,
        clocks: Mapping[nn.Parameter, VectorClock],
        completed_steps: Callable[[], int],
        host: HostMemory,
        collectives: StateCollectives,
    ) -> None:
        self._layout = layout
        self._clocks = clocks
        self._completed_steps = completed_steps
        self._host = host
        self._collectives = collectives

    def live(self, parameter: nn.Parameter, ahead: int = 0) -> torch.Tensor:
        return self._clocks[parameter].live(self._completed_steps() + ahead)

    def gather(
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
        vectors = factor.detach().index_select(axis, upload(index, factor.device))
        return vectors if axis == 0 else vectors.t().contiguous()

    def _exchange(
        self,
        factors: Sequence[tuple[nn.Parameter, torch.Tensor]],
        stored: Sequence[tuple[int, torch.Tensor]],
    ) -> list[torch.Tensor]:
        """Sums of what every rank has, zeros elsewhere: exact, as no element is on two ranks.

        One sum over the ranks that ZeRO slices for, and one over those that shard vectors along r.
        """
        axes = [self._clocks[factor].axis for factor, _ in factors]
        shapes = [
            (len(index), tp_local_shape(factor)[1 - axis])
            for (factor, index), axis in zip(factors, axes, strict=True)
        ]
        shapes += [(len(part), length) for length, part in stored]
        spread = [inner_shard(factor) is not None for factor, _ in factors]
        spread += [False] * len(stored)
        like = torch.empty(0, dtype=factors[0][0].dtype, device=self._collectives.device)
        wire, front, parts = lay_out_wire(shapes, spread, like)
        for out, (factor, index) in zip(parts, factors, strict=False):
            start, working = self._layout.working(factor)
            fragment = self._fragment(factor, Stretch(start, 0, working.numel()))
            for part in fragment.vectors(working, index):
                with distinct_places():
                    out[part.asked, part.span] = part.view[part.local]
        for out, (length, part) in zip(parts[len(factors) :], stored, strict=True):
            out[:, slice(*self._host.span(length))] = part
        if self._layout.weights_sharded:
            self._collectives.sum_over_slices(wire)
        if front.numel():
            self._collectives.sum_over_shards(front)
        return parts

    def write(self, parameter: nn.Parameter, index: torch.Tensor, values: torch.Tensor) -> None:
        assert not torch.is_grad_enabled(), "verbs of the state are called within no_grad"
        placement = self._layout.placements[parameter]
        start, working = self._layout.working(parameter)
        stretch, master = placement.stretch, placement.owner.detach().view(-1)
        targets = [(master, self._fragment(parameter, stretch))]
        if master.data_ptr() != working.data_ptr():
            here = Stretch(start, 0, working.numel())
            targets.append((working, self._fragment(parameter, here)))
        for flat, fragment in targets:
            for part in fragment.vectors(flat, index):
                with distinct_places():
                    part.view[part.local] = values[part.asked, part.span].to(flat)
        self._layout.drop_copies(parameter)

    def reset(self, parameter: nn.Parameter, index: torch.Tensor, frozen: int) -> int:
        clock, completed = self._clocks[parameter], self._completed_steps()
        placement, cleared = self._layout.placements[parameter], 0
        state = self._layout.optimizer.state.get(placement.owner, {})
        fragment = self._fragment(parameter, placement.stretch)
        for key in MOMENTS:
            if key in state:
                for part in fragment.vectors(state[key].view(-1), index):
                    with distinct_places():
                        part.view.index_fill_(0, part.local, 0.0)
                    cleared += len(part.local) * part.view.shape[1]
        clock.restart(completed, index)
        clock.freeze(completed + frozen, index)
        return cleared

    def _fragment(self, parameter: nn.Parameter, stretch: Stretch) -> Fragment:
        return fragment_of(parameter, stretch, self._clocks[parameter])


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
