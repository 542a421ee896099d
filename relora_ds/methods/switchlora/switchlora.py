"""SwitchLoRA (arXiv 2406.06564): replace single vectors of the adapters at every step.

A switch exchanges k rows of A and k columns of B for candidates, W absorbs the difference, so that
the function is the same, and Adam forgets the counterparts: the gradient of row i of A depends on
column i of B and on nothing else of the pair.

Between two updates the event is exact: a row that is replaced has no influence on its own gradient.
Frozen vectors are frozen in the optimizer, so they count in the norm that gradients are clipped by.

Islands that train apart have other vectors to replace, so that W would have to absorb another edit
on each of them. What is due in a round is therefore switched together at its end, as many vectors
as the frequency adds up to over its updates. Factors are common there, and the plan is: every
island makes the same edit of W, and nothing travels for it. The factors are their plain mean, as
those of methods that never merge. Its product is off by the covariance of the factors over islands,
which W could take up, as in merges; but every round would exchange all factors in full precision
for it, nearly eight times what they send in 4 bits, and re-factoring the exact mean brought nothing
where factors are never merged.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from relora_ds.activity import doing
from relora_ds.config.methods.switchlora import SwitchLoRAConfig
from relora_ds.methods.adapter import (
    AdapterLinear,
    AdapterMethod,
    adapter_layers,
    factor_bounds,
    refuse_lost_edits,
)
from relora_ds.methods.interface import Event, MemoryShare, Report, SavedTensor, Session
from relora_ds.methods.switchlora.candidate_pool import (
    Allocate,
    CandidatePool,
    park_together,
    take_together,
)
from relora_ds.methods.switchlora.metrics import SwitchMetrics, UpdateRank
from relora_ds.methods.switchlora.plan import (
    SELECTIONS,
    PairCensus,
    Plan,
    Selection,
    SwitchState,
    switch_counts,
)
from relora_ds.methods.train_state import LocatedVectors, TrainState
from relora_ds.numerics.base_weight import WeightEdit
from relora_ds.numerics.batched.draws import UniformRows
from relora_ds.numerics.batched.exchange import Exchange
from relora_ds.numerics.gpu import launch
from relora_ds.parallel.shape import global_shape, shard_of, tp_local_shape
from relora_ds.randomness import Stream

_SIDES = ("A", "B")


@dataclass
class _Switched:
    """One projection with what its switches need."""

    layer: AdapterLinear
    selection: Selection
    state: SwitchState
    pools: tuple[CandidatePool, CandidatePool]


@dataclass(frozen=True)
class _Work:
    """One projection's part of an event, and the candidates that it brings in."""

    switched: _Switched
    plan: Plan
    candidates: tuple[torch.Tensor, torch.Tensor]
    """This rank's spans of rows of A, (k, span of n), and columns of B, (k, span of m)."""
    both: tuple[LocatedVectors, LocatedVectors]
    """Of A and of B, the vectors at all switched indices."""
    rows: tuple[LocatedVectors, LocatedVectors]
    """The rows of A that are replaced, and their counterparts in B."""
    columns: tuple[LocatedVectors, LocatedVectors]
    """The columns of B that are replaced, and their counterparts in A."""

    def description(self) -> bytes:
        """Which vectors are exchanged for which candidates; the same on every rank."""
        parts = (part.tobytes() for part in (*self.plan.vectors, *self.plan.slots))
        return self.switched.layer.spec.name.encode() + b"".join(parts)


class SwitchLoRA(AdapterMethod[SwitchLoRAConfig]):
    """Switches between updates: none before the first, none after the last."""

    events_depend_on_steps = True

    def edited_weights(self, model: nn.Module) -> list[nn.Parameter]:
        return [layer.weight for layer in adapter_layers(model).values()]

    def vector_axes(self, model: nn.Module) -> dict[nn.Parameter, int]:
        axes: dict[nn.Parameter, int] = {}
        for layer in adapter_layers(model).values():
            axes[layer.lora_A], axes[layer.lora_B] = 0, 1
        return axes

    def memory_share(self, model: nn.Module) -> MemoryShare:
        count = 0
        for layer in adapter_layers(model).values():
            slots = min(layer.spec.out_features, layer.spec.in_features)
            count += slots * (tp_local_shape(layer.lora_A)[1] + tp_local_shape(layer.lora_B)[0])
        on_host = self.config.candidates == "host"
        return MemoryShare(host=count) if on_host else MemoryShare(device=count)

    def start(self, state: TrainState, model: nn.Module) -> SwitchLoRASession:
        return SwitchLoRASession(self, state, model)


class SwitchLoRASession(Session[SwitchLoRA]):
    """Switches vectors of a live engine, and keeps the candidates that are not in use."""

    def __init__(self, method: SwitchLoRA, state: TrainState, model: nn.Module) -> None:
        super().__init__(method, state, model)
        self.config = method.config
        allocate, writes = self._storage()
        self.layers = {
            name: self._prepare_layer(layer, allocate, writes)
            for name, layer in adapter_layers(model).items()
        }
        """Projections by name, with their candidates and what is in use of them."""
        self._ahead: tuple[int, list[_Work]] | None = None
        first = next(iter(self.layers.values()))
        self._pairs = PairCensus(first.selection.num_slots)
        self._pairs.note(first.state.slots)
        self._rank = UpdateRank(first.layer, method.seed)
        self._rank.start(state.weights)
        self._metrics = SwitchMetrics()
        length = tp_local_shape(first.layer.weight)[1]
        sliced = state.host.span(length) != (0, length)
        self._own_pools = self.config.candidates == "device" and not sliced
        device = first.layer.lora_A.device
        # candidates come from the host while the model computes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _storage(self) -> tuple[Allocate, bool]:
        if self.config.candidates == "host":
            return self.state.host.tensor, self.state.host.is_writer
        device = next(self.model.parameters()).device
        return (lambda shape, dtype: torch.zeros(*shape, dtype=dtype, device=device)), True

    def _prepare_layer(self, layer: AdapterLinear, allocate: Allocate, writes: bool) -> _Switched:
        spec, rank = layer.spec, self.config.rank
        num_slots = min(spec.out_features, spec.in_features)
        selection = SELECTIONS[self.config.selection](spec.name, rank, num_slots, self.method.seed)
        bounds = factor_bounds(self.config, spec.out_features, spec.in_features)
        pools = []
        for side, factor, bound in zip(_SIDES, (layer.lora_A, layer.lora_B), bounds, strict=True):
            draw, span = self._candidates(spec.name, side, factor, bound)
            pools.append(CandidatePool(num_slots, span, factor, draw, allocate, writes))
        return _Switched(layer, selection, selection.initial(), (pools[0], pools[1]))

    def _candidates(
        self, layer: str, side: str, factor: nn.Parameter, bound: float
    ) -> tuple[UniformRows, tuple[int, int]]:
        """How candidates of a factor are drawn, and the span of them that is kept here: of this
        tensor-parallel rank's part of a vector, what ZeRO leaves to this process."""
        axis = _SIDES.index(side)
        shard, width = shard_of(factor), global_shape(factor)[1 - axis]
        first = 0 if shard is None or shard.inner else int(shard.index[0])
        span = self.state.host.span(tp_local_shape(factor)[1 - axis])
        stream = Stream(self.method.seed, f"candidate_{side}", layer)
        return UniformRows(stream, width, first + span[0], first + span[1], bound), span

    def before_step(self, step: int) -> Event | None:
        if step >= 1 and (self._is_event(step) or self._is_event(step + 1)):
            with doing("switch"):
                self._events(step)
        return None

    def _is_event(self, step: int) -> bool:
        """Whether vectors may be replaced after `step` updates: weights are common to islands."""
        return self.method.round_ending(step) > 0

    def _events(self, step: int) -> None:
        """Switch what is due after `step` updates, and prepare what is after the next one."""
        started, moved = time.perf_counter(), self.state.bytes_moved
        if self._is_event(step):
            self._event(step)
        if step + 1 < self.method.steps and self._is_event(step + 1):
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                self._ahead = step + 1, self._plan(step + 1, ahead=1)
        self._metrics.seconds += time.perf_counter() - started
        self._metrics.bytes += self.state.bytes_moved - moved

    def _event(self, step: int) -> None:
        if self._ahead is not None and self._ahead[0] == step:
            work = self._ahead[1]
        else:
            work = self._plan(step, ahead=0)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        # also where nothing is due: another rank may think otherwise
        self.state.before_event("switch", b"".join(item.description() for item in work))
        if work:
            # reports wait for the device: one event per line of the log, the first
            self._switch(work, measured=self._metrics.events == 0)
        self._ahead = None

    def _plan(self, step: int, ahead: int) -> list[_Work]:
        """The event before update number `step` + 1, when `step` - `ahead` are completed: what is
        due since the one before."""
        since = step - self.method.round_ending(step)
        expected = self.config.switches_between(since, step, self.method.steps)
        counts = switch_counts(expected, len(self.layers), self.method.seed, step)
        plans = []
        for switched, count in zip(self.layers.values(), counts, strict=True):
            if not count:
                continue
            layer = switched.layer
            live = tuple(
                self.state.vectors.live(factor, ahead).numpy()
                for factor in (layer.lora_A, layer.lora_B)
            )
            plan = switched.selection.plan(switched.state, step, count, (live[0], live[1]))
            if plan.count:
                plans.append((switched, plan))
        return self._prepare(plans)

    def _prepare(self, plans: Sequence[tuple[_Switched, Plan]]) -> list[_Work]:
        """Bring candidates, and all numbers of an event in one copy, to the device."""
        requests, undrawn = [], []
        for switched, plan in plans:
            factor_a, factor_b = switched.layer.lora_A, switched.layer.lora_B
            rows, cols = (torch.from_numpy(vectors) for vectors in plan.vectors)
            both = torch.cat([rows, cols])
            requests += [(factor_a, both), (factor_b, both)]
            requests += [(factor_a, rows), (factor_b, rows), (factor_b, cols), (factor_a, cols)]
            undrawn += [p.undrawn(s) for p, s in zip(switched.pools, plan.slots, strict=True)]
        # kernels draw from numbers of the host
        kernels = launch.usable(next(iter(self.layers.values())).layer.lora_A.device)
        located, sent = self.state.vectors.locate(requests, () if kernels else undrawn)
        wanted = [
            (pool, slots)
            for switched, plan in plans
            for pool, slots in zip(switched.pools, plan.slots, strict=True)
        ]
        at, taken, work = iter(located), iter(take_together(wanted, sent or undrawn)), []
        for switched, plan in plans:
            both, rows, columns = ((next(at), next(at)) for _ in range(3))
            candidates = next(taken), next(taken)
            work.append(_Work(switched, plan, candidates, both, rows, columns))
        return work

    def _switch(self, work: Sequence[_Work], measured: bool) -> None:
        factors, stored = [], []
        for item in work:
            layer = item.switched.layer
            rows, cols = tp_local_shape(layer.weight)
            factors += item.both
            stored += [(cols, item.candidates[0]), (rows, item.candidates[1])]
        vectors = self.state.vectors.gather(factors, stored)
        current, fresh = vectors[: len(factors)], vectors[len(factors) :]
        pairs = zip(current[::2], current[1::2], fresh[::2], fresh[1::2], strict=True)
        exchanges = [
            Exchange(*four, scale=item.switched.layer.scale)
            for item, four in zip(work, pairs, strict=True)
        ]
        weights = [item.switched.layer.weight for item in work]
        edits = self.state.weights.absorb(list(zip(weights, exchanges, strict=True)), measured)
        self._exchange(work, exchanges)
        if edits is not None:
            # the host waits here, once, after all of the event was queued
            read = self.state.weights.totals(edits).tolist()
            names = [item.switched.layer.spec.name for item in work]
            totals = {name: WeightEdit.of(sums) for name, sums in zip(names, read, strict=True)}
            refuse_lost_edits("switch", totals, weights[0].dtype)
            self._metrics.note_edits(totals.values())
        self._note(work)

    def _exchange(self, work: Sequence[_Work], exchanges: Sequence[Exchange]) -> None:
        """Let the candidates take the places of what they replace, and park this."""
        state, parked, written, forgotten = self.state, [], [], []
        for item, exchange in zip(work, exchanges, strict=True):
            (old_a, _), (_, old_b) = exchange.a.chunk(2), exchange.b.chunk(2)
            slots = item.switched.state.apply(item.plan)
            for pool, held, old in zip(item.switched.pools, slots, (old_a, old_b), strict=True):
                parked.append((pool, held, old[:, slice(*state.host.span(old.shape[1]))]))
            (replaced_a, beside_a), (replaced_b, beside_b) = item.rows, item.columns
            written += [(replaced_a, exchange.new_a), (replaced_b, exchange.new_b)]
            forgotten += [beside_a, beside_b]
        park_together(parked)
        state.vectors.write(written)
        state.vectors.reset(forgotten, self.config.freeze_steps)

    def _note(self, work: Sequence[_Work]) -> None:
        first = next(iter(self.layers.values()))
        if any(item.switched is first for item in work):
            self._pairs.note(first.state.slots)
        # the counterpart of a row of A, n long, is a column of B, m long
        reset = sum(len(item.plan.vectors[0]) * _lengths(item.switched) for item in work)
        elements = sum(self.config.rank * _lengths(each) for each in self.layers.values())
        self._metrics.note_switches(sum(item.plan.count for item in work), reset / elements)

    def report(self) -> Report:
        visited = sum(
            pool.stored + int((pool.places()[held] < 0).sum())
            for switched in self.layers.values()
            for pool, held in zip(switched.pools, switched.state.slots, strict=True)
        )
        happened = self._metrics.events > 0
        metrics = {
            **self._metrics.read(),
            "method/candidates_visited": visited,
            "method/candidate_pairs": self._pairs.pairs,
            "method/effective_rank": self._rank.measure(self.state.weights),
            "method/host_bytes_per_node": self.state.host.node_bytes,
        }
        return Report(metrics, "switch" if happened else None)

    def replicas(self) -> dict[str, torch.Tensor]:
        """Which candidates are where, and the candidates themselves if every process has its own.

        One that differs elsewhere shows in the factor that it enters.
        """
        found = {}
        for name, switched in self.layers.items():
            for side, held, pool in zip(_SIDES, switched.state.slots, switched.pools, strict=True):
                found[f"{name}.{side} (slots)"] = torch.from_numpy(held)
                found[f"{name}.{side} (places)"] = pool.places()
                if self._own_pools:
                    for number, chunk in enumerate(pool.chunks()):
                        found[f"{name}.{side} (candidates, part {number})"] = chunk
        return found

    def state_dict(self) -> dict[str, Any]:
        if self._stream is not None:  # vectors on their way to and from the host
            self._stream.synchronize()
            torch.cuda.current_stream().synchronize()
        saved: dict[str, Any] = {
            "cursors": {name: list(s.state.cursors) for name, s in self.layers.items()},
            "switched_vectors": self._metrics.switched,
            "pairs": SavedTensor(self._pairs.tensor()),
            # of the rows of its weight
            self._rank.key: SavedTensor(self._rank.reference, f"{self._rank.layer}.weight"),
        }
        for name, switched in self.layers.items():
            shape = tp_local_shape(switched.layer.weight)
            for side, slots, pool, length in zip(
                _SIDES, switched.state.slots, switched.pools, shape[::-1], strict=True
            ):
                saved[f"{name}.{side}.slots"] = SavedTensor(torch.from_numpy(slots))
                saved[f"{name}.{side}.places"] = SavedTensor(pool.places())
                for number, chunk in enumerate(pool.chunks()):
                    whole = self.state.host.collect(chunk, length)
                    if whole is not None:  # parked vectors are rows, whatever their factor's axis
                        entry = SavedTensor(whole, f"{name}.lora_{side}", dim=1)
                        saved[f"{name}.{side}.vectors.{number}"] = entry
        return saved

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ahead = None
        self._metrics.switched = state["switched_vectors"]
        self._pairs.load(state["pairs"])
        self._rank.reference.copy_(state[self._rank.key])
        for name, switched in self.layers.items():
            first, second = state["cursors"][name]
            switched.state.cursors = first, second
            for side, held, pool in zip(_SIDES, switched.state.slots, switched.pools, strict=True):
                held[:] = state[f"{name}.{side}.slots"].numpy()
                chunks, prefix = [], f"{name}.{side}.vectors."
                while f"{prefix}{len(chunks)}" in state:
                    chunks.append(state[f"{prefix}{len(chunks)}"])
                pool.load(state[f"{name}.{side}.places"], chunks)


def _lengths(switched: _Switched) -> int:
    """Length of a row of A and a column of B together."""
    return switched.layer.spec.in_features + switched.layer.spec.out_features
