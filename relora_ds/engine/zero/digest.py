"""Do the replicas still agree? Cheap enough to ask after every event and every so many steps.

A fault in one rank's memory or arithmetic spreads into the average of all gradients, and nothing in
the loss shows it. Every tensor that several ranks hold alike is reduced to 64 bits, and these are
compared; of what is cut over ranks, the working values must be the rounded masters, and frozen
slices must be the ones that the last edit left behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.distributed import ProcessGroup

from relora_ds.engine.zero.layout import Layout
from relora_ds.engine.zero.matrices import ZeroMatrices
from relora_ds.errors import DesyncError
from relora_ds.numerics.base_weight import BaseWeight
from relora_ds.numerics.batched.fingerprints import fingerprints
from relora_ds.numerics.transfers import upload_together
from relora_ds.optim.vector_adamw import MOMENTS
from relora_ds.optim.vector_clock import VectorClock
from relora_ds.parallel.islands import ALONE, Islands
from relora_ds.parallel.shape import shard_of
from relora_ds.parallel.tensor import SINGLE, TensorParallel


class ReplicaDigest:
    """The comparison for one engine.

    Args:
        names: every parameter of the model by name.
        layout: where they and their masters are.
        bases: what lies beside the edited ones.
        clocks: step counts of vectors.
        matrices: state of what is updated matrix-wise.
        group: data-parallel ranks.
        tp: the tensor-parallel group, whose ranks hold some parameters alike.
        islands: whose weights are the same now and then.
        common: whether they are at the moment.
    """

    def __init__(
        self,
        names: Mapping[str, nn.Parameter],
        layout: Layout,
        bases: Mapping[nn.Parameter, BaseWeight],
        clocks: Mapping[nn.Parameter, VectorClock],
        matrices: ZeroMatrices,
        group: ProcessGroup,
        tp: TensorParallel = SINGLE,
        islands: Islands = ALONE,
        common: Callable[[], bool] = lambda: True,
    ) -> None:
        self._islands = islands
        self._common = common
        self._names = names
        self._layout = layout
        self._bases = bases
        self._clocks = clocks
        self._matrices = matrices
        self._group = group
        self._tp = tp
        self._seals: dict[nn.Parameter, torch.Tensor] = {}
        self.seal(names.values())

    @torch.no_grad()
    def seal(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remember frozen slices as they are now: no other rank has them to compare with."""
        if self._layout.weights_sharded:
            frozen = [p for p in parameters if p not in self._layout.placements]
            self._seals |= self._fingerprints_of_slices(frozen)

    @torch.no_grad()
    def check(self, more: Mapping[str, torch.Tensor], event: str | None) -> None:
        """Compare. A collective call; waits for the device.

        Args:
            more: further tensors by name, which every rank must hold alike.
            event: what happened last to the weights, for the message.

        Raises:
            DesyncError: on every rank, with the first tensor that differs and the ranks concerned.
        """
        alike = _fingerprinted([*self._replicated(), *more.items()])
        entries = [*alike, *self._local()]
        problem = self._compare(entries, self._group, event)
        if self._tp.group is not None and self._tp.size > 1:
            within = self._compare(_fingerprinted([*self._shared()]), self._tp.group, event)
            problem = self._agree(problem or within)
        if self._islands.group is not None and self._common():
            across = _fingerprinted([*self._weights()])
            found = self._compare(across, self._islands.group, event)
            problem = self._agree(problem or found)
        if problem is not None:
            raise DesyncError(problem)

    def _agree(self, problem: str | None) -> str | None:
        """The first problem that any rank has, so that all of them stop."""
        found = torch.full((), int(problem is not None), device=self._device())
        for group in (self._group, self._tp.group):
            torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX, group=group)
        if not int(found):
            return None
        for group in (self._group, self._tp.group):
            problems: list[str | None] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(problems, problem, group=group)
            problem = next((text for text in problems if text is not None), None)
        return problem

    def _compare(
        self, entries: Sequence[tuple[str, torch.Tensor]], group: ProcessGroup, event: str | None
    ) -> str | None:
        """What differs between the ranks of a group, if anything does."""
        names = [name for name, _ in entries]
        own = torch.tensor([name.endswith(_LOCAL) for name in names])
        mine, own = self._together([value for _, value in entries], own)
        # the largest and, inverted, the smallest in one reduction
        extremes = torch.cat([mine, ~mine])
        torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=group)
        high, low = extremes.chunk(2)
        wrong = (high != ~low) | (high * own != 0)
        if not bool(wrong.any()):  # the host waits here, once
            return None
        everyone = mine.new_empty(torch.distributed.get_world_size(group) * mine.numel())
        torch.distributed.all_gather_into_tensor(everyone, mine, group=group)
        ranks = torch.distributed.get_process_group_ranks(group)
        found = everyone.view(-1, mine.numel())
        return _report(names, found, ranks, event)

    def _together(
        self, values: Sequence[torch.Tensor], own: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scalars of the device and of the host as one tensor in their order, and `own`, both on
        the device. What comes from the host is one copy."""
        device = self._device()
        here = [number for number, value in enumerate(values) if value.device == device]
        there = [number for number, value in enumerate(values) if value.device != device]
        brought = torch.stack([values[number].cpu() for number in there]) if there else own[:0]
        order = torch.tensor([*here, *there]).argsort()
        sent = upload_together([brought.to(torch.int64), own.to(torch.int64), order], device)
        parts = [torch.stack([values[number] for number in here])] if here else []
        return torch.cat([*parts, sent[0]])[sent[2]], sent[1]

    def _shared(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the ranks of a tensor-parallel group hold alike: the same slices of parameters that
        are not cut, and of their moments, and all clocks."""
        for name, parameter in self._names.items():
            if shard_of(parameter) is None:
                yield name, self._layout.working(parameter)[1]
                if parameter in self._layout.placements:
                    for key in MOMENTS:
                        moment = self._layout.optimizer_state(parameter, key)
                        if moment is not None and moment.dtype.itemsize > 1:
                            yield f"{name} ({key})", moment
            if parameter in self._clocks:
                for key, tensor in self._clocks[parameter].tensors().items():
                    yield f"{name} ({key})", tensor
        yield from self._matrices.shared()

    def _replicated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What every rank must hold alike."""
        for name, parameter in self._names.items():
            # under stage 3 a gathered copy where there is one; whether there is agrees on all ranks
            yield name, parameter.data
            if not self._layout.weights_sharded and parameter in self._bases:
                for key, tensor in self._bases[parameter].tensors().items():
                    yield f"{name} ({key})", tensor
            if self._layout.partition_group is None and parameter in self._layout.placements:
                for key in MOMENTS:
                    moment = self._layout.optimizer_state(parameter, key)
                    if moment is not None:
                        yield f"{name} ({key})", moment
            if parameter in self._clocks:
                for key, tensor in self._clocks[parameter].tensors().items():
                    yield f"{name} ({key})", tensor
        yield from self._matrices.replicated()

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What ranks with one place in their islands hold alike where weights are common: their
        slices of these, and what lies beside."""
        for name, parameter in self._names.items():
            yield name, self._layout.working(parameter)[1]
            for kept in (self._bases.get(parameter), self._clocks.get(parameter)):
                for key, tensor in kept.tensors().items() if kept is not None else ():
                    yield f"{name} ({key})", tensor

    def _local(self) -> Iterator[tuple[str, torch.Tensor]]:
        """1 where this rank disagrees with itself, 0 elsewhere."""
        sealed = self._fingerprints_of_slices(list(self._seals))
        for name, parameter in self._names.items():
            if parameter in self._layout.placements:
                broken = self._layout.mismatch(parameter)
            elif parameter in self._seals:
                broken = sealed[parameter] != self._seals[parameter]
            else:
                continue
            yield name + _LOCAL, broken.to(torch.int64)

    def _fingerprints_of_slices(
        self, parameters: Sequence[nn.Parameter]
    ) -> dict[nn.Parameter, torch.Tensor]:
        """Of the slices of frozen weights that this rank stores, with what lies beside them."""
        slices = []
        for parameter in parameters:
            beside = self._bases[parameter].tensors() if parameter in self._bases else {}
            slices.append([self._layout.working(parameter)[1], *beside.values()])
        values = iter(fingerprints([tensor for parts in slices for tensor in parts]))
        found = {}
        for parameter, parts in zip(parameters, slices, strict=True):
            value = next(values)
            for _ in parts[1:]:
                value = value * 31 + next(values).to(value.device)
            found[parameter] = value
        return found

    def _device(self) -> torch.device:
        return next(iter(self._names.values())).device


_LOCAL = " (its masters, or the last edit of it)"


def _fingerprinted(
    named: Sequence[tuple[str, torch.Tensor]],
) -> list[tuple[str, torch.Tensor]]:
    values = fingerprints([tensor for _, tensor in named])
    return [(name, value) for (name, _), value in zip(named, values, strict=True)]


def _report(
    names: list[str], everyone: torch.Tensor, ranks: Sequence[int], event: str | None
) -> str:
    """Describe the first tensor that is wrong.

    Args:
        everyone: (ranks, tensors).
        ranks: global numbers of the ranks.
        event: what happened last to the weights.
    """
    after = f", after a {event}" if event else ""
    for index, name in enumerate(names):
        values = everyone[:, index].tolist()
        usual = 0 if name.endswith(_LOCAL) else Counter(values).most_common(1)[0][0]
        odd = [rank for rank, value in zip(ranks, values, strict=True) if value != usual]
        if odd:
            return (
                f"rank {', '.join(map(str, odd))} disagrees with the others on "
                f"{name.removesuffix(_LOCAL)}, or with itself{after}: its memory or arithmetic is "
                "at fault, or it runs other code; check the machine and resume from the last "
                "checkpoint"
            )
    raise AssertionError("called without a difference")
