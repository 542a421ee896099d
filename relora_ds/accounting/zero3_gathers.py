"""What ZeRO stage 3 gathers in one update: DeepSpeed's coordinator, replayed without data.

A module's parameters are gathered when it is entered, forward or backward, unless they are still
whole, and cut again when it is left. From the second micro-batch on DeepSpeed knows the order of
modules. It then gathers `stage3_prefetch_bucket_size` elements ahead, keeps what is needed again
within `stage3_max_reuse_distance`, and keeps parameters of at most
`stage3_param_persistence_threshold` elements whole for all micro-batches of an update. What is
gathered twice, once or not at all follows from these rules, the sizes and the order alone. With
`zero_hpz_partition_size` a parameter that was gathered once is kept a second time, cut over the
processes of a node only: trained ones until the update, frozen ones until a method edits them.

The order is taken from a model without memory, on the meta device, where recomputation in the
backward pass happens as it does in training.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from relora_ds.parallel.zero import Gathering


class Visit(NamedTuple):
    """A module is entered or left."""

    module: nn.Module
    enters: bool
    backward: bool
    """The module's own backward pass; a recomputed one is entered forward while `phase` is
    `backward`."""
    phase: str
    """`forward` or `backward`: the pass that is under way."""


class Gather(NamedTuple):
    """Where and when parameters are gathered."""

    phase: str
    """`forward`, `backward` or `step`."""
    near: bool
    """Among the processes of one node, from hpZ's second copy."""


class Replay(NamedTuple):
    """What one update gathers."""

    elements: dict[Gather, int]
    """Elements of whole parameters, padded to a multiple of the processes, by kind."""
    calls: int
    """Collectives that this takes."""
    live: int
    """Most elements of whole parameters that a process holds at once."""


@functools.lru_cache(maxsize=1)  # a plan asks for several stages of one model
def visits(model: nn.Module, tp_size: int) -> Sequence[Visit]:
    """The modules of one micro-batch in order, as DeepSpeed's hooks see them.

    Args:
        model: a `Llama` in training mode on the meta device, which does not change any more.
        tp_size: processes that share it.
    """
    seen: list[Visit] = []
    phase, handles = "forward", []

    def note(enters: bool, backward: bool) -> Any:
        return lambda module, *_: seen.append(Visit(module, enters, backward, phase))

    for module in model.modules():
        handles += [
            module.register_forward_pre_hook(note(True, False)),
            module.register_forward_hook(note(False, False)),
            module.register_full_backward_pre_hook(note(True, True)),
            module.register_full_backward_hook(note(False, True)),
        ]
    with torch.enable_grad(), warnings.catch_warnings():
        # the embedding's input has no gradient, so its hook says that it fires early
        warnings.simplefilter("ignore")
        # no part of the sequence may be empty
        loss = model(torch.zeros(1, 1 + tp_size, dtype=torch.int64, device="meta"))
        phase = "backward"
        loss.backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    return seen


def gathered(
    model: nn.Module,
    settings: Gathering,
    dp_size: int,
    micro_batches: int,
    tp_size: int = 1,
) -> Replay:
    """What one update gathers once the order of modules is known.

    The first micro-batch of a run, and the one after a forward pass without a backward one, is
    recorded anew: it keeps and prefetches nothing.

    Args:
        model: a `Llama` on the meta device, in the working state of training.
        settings: when weights are gathered, and for how long.
        dp_size: processes, at least 2.
        micro_batches: of one update.
        tp_size: processes that share a copy of the model.
    """
    replay = _Coordinator(model, visits(model, tp_size), settings, dp_size)
    replay.micro_batch(recording=True)
    if micro_batches > 1:
        replay.micro_batch()
    replay.step()
    # what is left over from one micro-batch to the next is the same from the second on
    replay.calls = 0
    passes = [(replay.micro_batch(), replay.calls) for _ in range(min(micro_batches, 3))]
    total = Counter({Gather("step", False): replay.step()})
    for each, _ in passes:
        total.update(each)
    repeated = micro_batches - len(passes)
    for gather, elements in passes[-1][0].items():
        total[gather] += repeated * elements
    calls = replay.calls
    if repeated:
        calls += repeated * (passes[-1][1] - passes[-2][1])
    return Replay(dict(total), calls, replay.live)


class _Coordinator:
    """State of DeepSpeed's `PartitionedParameterCoordinator`, sizes in place of tensors."""

    def __init__(
        self, model: nn.Module, order: Sequence[Visit], settings: Gathering, dp_size: int
    ) -> None:
        self._visits = order
        self._dp_size = dp_size
        self._prefetch, self._distance = settings.prefetch, settings.reuse_distance
        self._live = settings.live
        self._persistent = {p for p in model.parameters() if p.numel() <= settings.persistence}
        # torch walks a module's dictionaries for these: looked up millions of times at 7B
        self._own = {m: list(m.parameters(recurse=False)) for m in model.modules()}
        self._size = {m: sum(p.numel() for p in own) for m, own in self._own.items()}
        self._entered = [visit.module for visit in self._visits if visit.enters]
        self._order = [(p, n) for n, m in enumerate(self._entered) for p in self._own[m]]
        self._whole: set[nn.Parameter] = set()
        self._kept: dict[tuple[nn.Module, int], set[nn.Parameter]] = {}
        # what has a second copy within the node; DeepSpeed makes it when it cuts a parameter
        self._has_near = settings.hpz > 1
        self._near = {p for p in model.parameters() if self._has_near}
        self._moved: Counter[Gather] = Counter()
        self.calls = self.live = 0
        self._held = 0
        self._recording = False
        self._begin()

    def _begin(self) -> None:
        """What DeepSpeed forgets between micro-batches."""
        self._number, self._in_use = 0, 0
        self._queue = deque([] if self._recording else self._order)
        # the last place in the order for which a parameter was fetched
        self._fetched: dict[nn.Parameter, int] = defaultdict(lambda: -1)
        self._users: dict[nn.Parameter, set[nn.Module]] = defaultdict(set)
        # modules within their backward pass, and what was recomputed for them
        self._open: dict[nn.Module, set[nn.Parameter]] = {}

    def step(self) -> int:
        """An optimizer's step cuts everything and gathers what persists, from all processes."""
        self._whole = set(self._persistent)
        self._near = {p for p in self._near if not p.requires_grad}
        self._held = sum(p.numel() for p in self._whole)
        self.calls += len(self._whole)
        return sum(self._padded(p) for p in self._whole)

    def micro_batch(self, recording: bool = False) -> Counter[Gather]:
        """Elements gathered in its forward and its backward pass."""
        self._moved = Counter()
        self._recording = recording
        self._begin()
        for visit in self._visits:
            if visit.enters:
                self._enter(visit)
            else:
                self._leave(visit)
        for module in reversed(list(self._open)):  # those whose input needs no gradient
            self._release(module, {*self._own[module], *self._open[module]} - self._persistent)
        return self._moved

    def _enter(self, visit: Visit) -> None:
        if visit.backward:
            self._open[visit.module] = set()
        needed = self._own[visit.module]
        self._gather(needed, visit.phase)
        for parameter in needed:
            self._users[parameter].add(visit.module)
            recomputed = visit.phase == "backward" and not visit.backward
            if recomputed and self._open and not parameter.requires_grad:
                owner = next(reversed(self._open))
                self._open[owner].add(parameter)
                self._users[parameter].add(owner)
        if not self._recording:
            self._look_ahead(needed, visit.phase)
        self._number += 1

    def _look_ahead(self, needed: Sequence[nn.Parameter], phase: str) -> None:
        late = sum(self._fetched[p] < self._number for p in needed)
        for _ in range(late):
            parameter, number = self._queue.popleft()
            self._fetched[parameter] = number
        budget = min(self._live - self._in_use, self._prefetch)
        ahead: dict[nn.Parameter, None] = {}
        size = 0
        while self._queue and size < budget:
            parameter, number = self._queue.popleft()
            self._fetched[parameter] = max(self._fetched[parameter], number)
            if parameter not in self._whole and parameter not in ahead:
                ahead[parameter] = None
                size += parameter.numel()
        self._gather(list(ahead), phase)

    def _gather(self, parameters: Sequence[nn.Parameter], phase: str) -> None:
        missing = [p for p in parameters if p not in self._whole]
        self.calls += len({p in self._near for p in missing})
        for parameter in missing:
            if parameter not in self._whole:  # a tied one can be there twice
                self._whole.add(parameter)
                self._in_use += parameter.numel()
                self._held += parameter.numel()
                self._moved[Gather(phase, parameter in self._near)] += self._padded(parameter)
        self.live = max(self.live, self._held)

    def _leave(self, visit: Visit) -> None:
        module = visit.module
        released = set(self._own[module]) if self._recording else self._unneeded(module)
        if visit.backward:
            released = released | (self._open.get(module, set()) - self._persistent)
        self._release(module, released, backward=visit.backward)

    def _unneeded(self, module: nn.Module) -> set[nn.Parameter]:
        """Decided once for each place in the order, as DeepSpeed's cache does."""
        place = (module, self._number)
        if place not in self._kept:
            found = {p for p in self._own[module] if p not in self._persistent}
            found = {p for p in found if self._fetched[p] <= self._number}
            passed = 0
            for later in self._entered[self._number :]:
                if passed >= self._distance or not found:
                    break
                found.difference_update(self._own[later])
                passed += self._size[later]
            self._kept[place] = found
        return self._kept[place]

    def _release(
        self, module: nn.Module, released: set[nn.Parameter], backward: bool = True
    ) -> None:
        own = set(self._own[module])
        if backward:
            own |= self._open.pop(module, set())
        for parameter in own:
            self._users[parameter].discard(module)
            if parameter in released and parameter in self._whole and not self._users[parameter]:
                self._whole.discard(parameter)
                self._in_use -= parameter.numel()
                self._held -= parameter.numel()
                if self._has_near:
                    self._near.add(parameter)

    def _padded(self, parameter: nn.Parameter) -> int:
        return -(-parameter.numel() // self._dp_size) * self._dp_size
