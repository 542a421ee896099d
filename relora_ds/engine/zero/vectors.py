"""Single vectors of clocked parameters on top of a layout: the port `Vectors`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from relora_ds.engine.zero.collectives import StateCollectives
from relora_ds.engine.zero.fragments import fragment_of
from relora_ds.engine.zero.moments import OptimizerSlices
from relora_ds.engine.zero.weights import Beside
from relora_ds.methods.train_state import HostMemory, LocatedVectors, Vectors
from relora_ds.numerics.batched.rows import Move, Rows, clear_rows, copy_matrices, copy_rows
from relora_ds.numerics.gpu import launch
from relora_ds.numerics.transfers import upload_together
from relora_ds.optim.vector_adamw import MOMENTS
from relora_ds.optim.vector_clock import Fragment, Stretch, VectorPlaces
from relora_ds.parallel.shape import inner_shard, tp_local_shape


@dataclass(frozen=True)
class _Located(LocatedVectors):
    """Vectors with their places in this rank's parts of a parameter."""

    owner: torch.Tensor
    """The tensor that the optimizer steps."""
    working: tuple[VectorPlaces, ...]
    """In the working values."""
    master: tuple[VectorPlaces, ...]
    """In the master and its moments; the very same object where both are cut alike."""

    def _shares(self, device: torch.device) -> bool:
        return self.master is self.working and self.owner.device == device

    def travelling(self, device: torch.device) -> tuple[VectorPlaces, ...]:
        """The places that are needed on the device: an offloaded master is on the host."""
        alone = self._shares(device) or self.owner.device != device
        return self.working if alone else self.working + self.master

    def arrived(self, device: torch.device, indices: Iterator[torch.Tensor]) -> _Located:
        """The same with indices of the device, in the order of `travelling`."""

        def taken(places: tuple[VectorPlaces, ...]) -> tuple[VectorPlaces, ...]:
            return tuple(VectorPlaces(each.rectangle, next(indices)) for each in places)

        working = taken(self.working)
        if self._shares(device):
            return replace(self, working=working, master=working)
        if self.owner.device != device:
            return replace(self, working=working)
        return replace(self, working=working, master=taken(self.master))


def _here(vectors: LocatedVectors) -> _Located:
    assert isinstance(vectors, _Located), "located by another run"
    return vectors


class ZeroVectors(Vectors):
    """Rows and columns of factors, whole or in pieces, wherever the layout says they are.

    Args:
        slices: what the optimizer keeps here.
        host: knows which span of a stored vector is kept here.
        collectives: sums over the ranks that hold other parts.
        beside: what else is known of the elements of a tensor that the optimizer steps: tensors
            (N,) on the host, of its size. It is forgotten of vectors that are set, or begin anew.
    """

    def __init__(
        self,
        slices: OptimizerSlices,
        host: HostMemory,
        collectives: StateCollectives,
        beside: Beside,
    ) -> None:
        self._slices = slices
        self._layout = slices.layout
        self._host = host
        self._collectives = collectives
        self._beside = beside

    def live(self, parameter: nn.Parameter, ahead: int = 0) -> torch.Tensor:
        return self._slices.clocks[parameter].live(self._slices.completed_steps() + ahead)

    def locate(
        self,
        requests: Sequence[tuple[nn.Parameter, torch.Tensor]],
        numbers: Sequence[torch.Tensor] = (),
    ) -> tuple[list[LocatedVectors], list[torch.Tensor]]:
        device = self._collectives.device
        found = [self._find(parameter, index) for parameter, index in requests]
        if launch.usable(device):  # kernels take addresses, which the host computes
            return list(found), upload_together(numbers, device)
        indices = [place.index for each in found for place in each.travelling(device)]
        arrived = iter(upload_together([*numbers, *indices], device))
        sent = [next(arrived) for _ in numbers]
        return [each.arrived(device, arrived) for each in found], sent

    def _find(self, parameter: nn.Parameter, index: torch.Tensor) -> _Located:
        placement = self._layout.placements[parameter]
        working = self._working(parameter)[1]
        master = self._fragment(parameter, placement.stretch)
        found = working.find(index)
        alike = (working.start, working.length) == (master.start, master.length)
        return _Located(
            parameter, index, placement.owner, found, found if alike else master.find(index)
        )

    def gather(
        self,
        factors: Sequence[LocatedVectors],
        stored: Sequence[tuple[int, torch.Tensor]] = (),
    ) -> list[torch.Tensor]:
        spread = any(inner_shard(each.parameter) is not None for each in factors)
        if not self._layout.weights_sharded and not spread:
            return [*self._own_vectors(factors), *(part for _, part in stored)]
        return self._exchange(factors, stored)

    def _own_vectors(self, factors: Sequence[LocatedVectors]) -> list[torch.Tensor]:
        """Vectors of which this rank has all that there is."""
        device = self._collectives.device
        if launch.usable(device):
            like = torch.empty(0, dtype=factors[0].parameter.dtype, device=device)
            _, _, parts = lay_out_wire(self._shapes(factors), [False] * len(factors), like)
            self._read(factors, parts)
            return parts
        found = []
        for each in factors:
            (everything,) = _here(each).working
            axis = self._slices.clocks[each.parameter].axis
            chosen = each.parameter.detach().index_select(axis, everything.index[0])
            found.append(chosen if axis == 0 else chosen.t().contiguous())
        return found

    def _read(self, factors: Sequence[LocatedVectors], parts: Sequence[torch.Tensor]) -> None:
        """What this rank stores of vectors, to their places in `parts`, (k, length) each."""
        moves = []
        for out, each in zip(parts, factors, strict=True):
            working, fragment = self._working(each.parameter)
            for part in fragment.parts(working, _here(each).working):
                target = Rows(out[:, part.span], part.asked)
                moves.append((target, Rows(part.view, part.local)))
        copy_rows(moves, self._collectives.device)

    def _shapes(self, factors: Sequence[LocatedVectors]) -> list[tuple[int, int]]:
        """Of some vectors of each factor, as rows."""
        return [
            (len(each.index), tp_local_shape(p)[1 - self._slices.clocks[p].axis])
            for each, p in ((each, each.parameter) for each in factors)
        ]

    def _exchange(
        self,
        factors: Sequence[LocatedVectors],
        stored: Sequence[tuple[int, torch.Tensor]],
    ) -> list[torch.Tensor]:
        """Sums of what every rank has, zeros elsewhere: exact, as no element is on two ranks.

        One sum over the ranks that ZeRO slices for, and one over those that shard vectors along r.
        """
        shapes = self._shapes(factors) + [(len(part), length) for length, part in stored]
        spread = [inner_shard(each.parameter) is not None for each in factors]
        spread += [False] * len(stored)
        dtype, device = factors[0].parameter.dtype, self._collectives.device
        like = torch.empty(0, dtype=dtype, device=device)
        wire, front, parts = lay_out_wire(shapes, spread, like)
        self._read(factors, parts[: len(factors)])
        whole = []
        for out, (length, part) in zip(parts[len(factors) :], stored, strict=True):
            whole.append((out[:, slice(*self._host.span(length))], part))
        copy_matrices(whole, device)
        if self._layout.weights_sharded:
            self._collectives.sum_over_slices(wire)
        if front.numel():
            self._collectives.sum_over_shards(front)
        return parts

    def write(self, written: Sequence[tuple[LocatedVectors, torch.Tensor]]) -> None:
        assert not torch.is_grad_enabled(), "verbs of the state are called within no_grad"
        moves: dict[torch.device, list[Move]] = {}
        for vectors, values in written:
            parameter, where = vectors.parameter, _here(vectors)
            placement = self._layout.placements[parameter]
            master = placement.owner.detach().view(-1)
            targets = [(master, self._fragment(parameter, placement.stretch), where.master)]
            if placement.owner is not parameter:
                targets.append((*self._working(parameter), where.working))
            for flat, fragment, places in targets:
                beside = values.to(flat.device)
                for part in fragment.parts(flat, places):
                    move = Rows(part.view, part.local), Rows(beside[:, part.span], part.asked)
                    moves.setdefault(flat.device, []).append(move)
        for device, here in moves.items():
            copy_rows(here, device)
        for vectors, _ in written:
            self._layout.drop_copies(vectors.parameter)
            self._forget_beside(vectors)

    def reset(self, vectors: Sequence[LocatedVectors], frozen: int) -> int:
        completed, cleared = self._slices.completed_steps(), 0
        rows: dict[torch.device, list[Rows]] = {}
        for each in vectors:
            parameter, places = each.parameter, _here(each).master
            clock = self._slices.clocks[parameter]
            stretch, moments = self._moments(parameter)
            fragment = self._fragment(parameter, stretch)
            for moment in moments:
                for part in fragment.parts(moment.view(-1), places):
                    rows.setdefault(moment.device, []).append(Rows(part.view, part.local))
                    cleared += len(part.local) * part.view.shape[1]
            clock.restart(completed, each.index)
            clock.freeze(completed + frozen, each.index)
            self._forget_beside(each)
        for device, here in rows.items():
            clear_rows(here, device)
        return cleared

    def _forget_beside(self, vectors: LocatedVectors) -> None:
        placement = self._layout.placements[vectors.parameter]
        for flat in self._beside(placement.owner):
            fragment = self._fragment(vectors.parameter, placement.stretch)
            for part in fragment.parts(flat, fragment.find(vectors.index)):
                part.view.index_fill_(0, part.local, 0.0)

    def _moments(self, parameter: nn.Parameter) -> tuple[Stretch, tuple[torch.Tensor, ...]]:
        """This rank's moments of a parameter, and where in them its elements lie."""
        placement = self._layout.placements[parameter]
        if parameter in self._slices.by_matrix:
            return replace(placement.stretch, offset=0), self._slices.by_matrix[parameter]
        state = self._layout.optimizer.state.get(placement.owner, {})
        return placement.stretch, tuple(state[key] for key in MOMENTS if key in state)

    def _working(self, parameter: nn.Parameter) -> tuple[torch.Tensor, Fragment]:
        """What this rank stores of the working values, 1-D, and its vectors."""
        start, working = self._layout.working(parameter)
        return working, self._fragment(parameter, Stretch(start, 0, working.numel()))

    def _fragment(self, parameter: nn.Parameter, stretch: Stretch) -> Fragment:
        return fragment_of(parameter, stretch, self._slices.clocks[parameter])


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
