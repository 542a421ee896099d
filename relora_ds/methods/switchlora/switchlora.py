"""SwitchLoRA (arXiv 2406.06564): replace single vectors of the adapters at every step.

A switch exchanges k rows of A and k columns of B for candidates, W absorbs the difference, so that
the function is the same, and Adam forgets the counterparts: the gradient of row i of A depends on
column i of B and on nothing else of the pair.

Between two updates the event is exact: a row that is replaced has no influence on its own gradient.
Frozen vectors are frozen in the optimizer, so they count in the norm that gradients are clipped by.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from relora_ds.config.methods.switchlora import SwitchLoRAConfig
from relora_ds.methods.adapter import (
    AdapterLinear,
    AdapterMethod,
    adapter_layers,
    factor_bounds,
)
from relora_ds.methods.interface import Event
from relora_ds.methods.switchlora.candidate_pool import Allocate, CandidatePool, Draw
from relora_ds.methods.switchlora.metrics import SwitchMetrics, UpdateRank, refuse_lost_switch
from relora_ds.methods.switchlora.plan import (
    SELECTIONS,
    PairCensus,
    Plan,
    Selection,
    SwitchState,
    switch_counts,
)
from relora_ds.methods.train_state import TrainState
from relora_ds.numerics.base_weight import WeightEdit
from relora_ds.parallel.shape import TPShard, global_shape, shard_of, tp_local_shape
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


class SwitchLoRA(AdapterMethod[SwitchLoRAConfig]):
    """Switches between updates: none before the first, none after the last."""

    def edited_weights(self, model: nn.Module) -> list[nn.Parameter]:
        return [layer.weight for layer in adapter_layers(model).values()]

    def vector_axes(self, model: nn.Module) -> dict[nn.Parameter, int]:
        axes: dict[nn.Parameter, int] = {}
        for layer in adapter_layers(model).values():
            axes[layer.lora_A], axes[layer.lora_B] = 0, 1
        return axes

    def attach(self, state: TrainState, model: nn.Module) -> None:
        allocate, writes = self._storage(state, model)
        self._layers = {
            name: self._prepare_layer(state, layer, allocate, writes)
            for name, layer in adapter_layers(model).items()
        }
        self._collect = state.collect
        self._ahead: tuple[int, list[_Work]] | None = None
        first = next(iter(self._layers.values()))
        self._pairs = PairCensus(first.selection.num_slots)
        self._pairs.note(first.state.slots)
        self._rank = UpdateRank(first.layer, self.seed)
        self._rank.start(state)
        self._figures = SwitchMetrics()
        length = tp_local_shape(first.layer.weight)[1]
        cut = state.own_span(length) != (0, length)
        self._own_pools = self.config.candidates == "device" and not cut
        device = first.layer.lora_A.device
        # candidates come from the host while the model computes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _storage(self, state: TrainState, model: nn.Module) -> tuple[Allocate, bool]:
        if self.config.candidates == "host":
            return state.node_tensor, state.writes_node()
        device = next(model.parameters()).device
        return (lambda shape, dtype: torch.zeros(*shape, dtype=dtype, device=device)), True

    def _prepare_layer(
        self, state: TrainState, layer: AdapterLinear, allocate: Allocate, writes: bool
    ) -> _Switched:
        spec, rank = layer.spec, self.config.rank
        num_slots = min(spec.out_features, spec.in_features)
        selection = SELECTIONS[self.config.selection](spec.name, rank, num_slots, self.seed)
        bounds = factor_bounds(self.config, spec.out_features, spec.in_features)
        pools = []
        for side, factor, bound in zip(_SIDES, (layer.lora_A, layer.lora_B), bounds, strict=True):
            draw, span = self._candidates(state, spec.name, side, factor, bound)
            pools.append(CandidatePool(num_slots, span, factor, draw, allocate, writes))
        return _Switched(layer, selection, selection.initial(), (pools[0], pools[1]))

    def _candidates(
        self, state: TrainState, layer: str, side: str, factor: nn.Parameter, bound: float
    ) -> tuple[Draw, tuple[int, int]]:
        """How candidates of a factor are drawn, and the span of them that is kept here: of this
        tensor-parallel rank's part of a vector, what ZeRO leaves to this process."""
        axis = _SIDES.index(side)
        shard, width = shard_of(factor), global_shape(factor)[1 - axis]
        first = 0 if shard is None or shard.inner else int(shard.index[0])
        span = state.own_span(tp_local_shape(factor)[1 - axis])
        stream = Stream(self.seed, f"candidate_{side}", layer)
        start, stop = first + span[0], first + span[1]

        def draw(slots: torch.Tensor) -> torch.Tensor:
            return stream.uniform_rows(slots, width, start, stop).mul_(2.0).sub_(1.0).mul_(bound)

        return draw, span

    def parked_elements(self, model: nn.Module) -> tuple[int, int]:
        count = 0
        for layer in adapter_layers(model).values():
            slots = min(layer.spec.out_features, layer.spec.in_features)
            count += slots * (tp_local_shape(layer.lora_A)[1] + tp_local_shape(layer.lora_B)[0])
        return (0, count) if self.config.candidates == "host" else (count, 0)

    def before_step(self, state: TrainState, model: nn.Module, step: int) -> Event | None:
        if step < 1:
            return None
        started, moved = time.perf_counter(), state.bytes_moved
        if self._ahead is not None and self._ahead[0] == step:
            work = self._ahead[1]
        else:
            work = self._plan(state, step, ahead=0)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        if work:
            # reports wait for the device: one event per line of the log, the first
            self._switch(state, work, measured=self._figures.events == 0)
        self._ahead = None
        if step + 1 < self.steps:
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                self._ahead = step + 1, self._plan(state, step + 1, ahead=1)
        self._figures.seconds += time.perf_counter() - started
        self._figures.bytes += state.bytes_moved - moved
        return None

    def _plan(self, state: TrainState, step: int, ahead: int) -> list[_Work]:
        """The event before update number `step` + 1, when `step` - `ahead` are completed."""
        expected = self.config.expected_switches(step, self.steps)
        counts = switch_counts(expected, len(self._layers), self.seed, step)
        work = []
        for switched, count in zip(self._layers.values(), counts, strict=True):
            if not count:
                continue
            layer = switched.layer
            live = tuple(
                state.live_vectors(factor, ahead).numpy() for factor in (layer.lora_A, layer.lora_B)
            )
            plan = switched.selection.plan(switched.state, step, count, (live[0], live[1]))
            if plan.count:
                pool_a, pool_b = switched.pools
                candidates = pool_a.take(plan.slots[0]), pool_b.take(plan.slots[1])
                work.append(_Work(switched, plan, candidates))
        return work

    def _switch(self, state: TrainState, work: Sequence[_Work], measured: bool) -> None:
        factors, stored = [], []
        for item in work:
            layer = item.switched.layer
            rows, cols = tp_local_shape(layer.weight)
            both = torch.from_numpy(np.concatenate(item.plan.vectors))
            factors += [(layer.lora_A, both), (layer.lora_B, both)]
            stored += [(cols, item.candidates[0]), (rows, item.candidates[1])]
        vectors = state.gather_vectors(factors, stored)
        current, fresh = vectors[: len(factors)], vectors[len(factors) :]
        edits: dict[str, WeightEdit] = {}
        for number, item in enumerate(work):
            at = slice(2 * number, 2 * number + 2)
            edit = self._switch_layer(state, item, current[at], fresh[at], measured)
            if edit is not None:
                edits[item.switched.layer.spec.name] = edit
        if edits:
            totals = dict(zip(edits, state.total_edits(list(edits.values())), strict=True))
            refuse_lost_switch(totals)
            self._figures.note_edits(totals.values())
        self._note(work)

    def _switch_layer(
        self,
        state: TrainState,
        item: _Work,
        current: Sequence[torch.Tensor],
        fresh: Sequence[torch.Tensor],
        measured: bool,
    ) -> WeightEdit | None:
        """Exchange the vectors of one projection.

        Args:
            current: working values of both factors at the switched indices, first those of which
                the row of A is replaced, then those of which the column of B is; (2k, n), (2k, m).
            fresh: the candidates, (k, n) and (k, m).
        """
        layer, pools, plan = item.switched.layer, item.switched.pools, item.plan
        old_a, kept_a = current[0].chunk(2)
        kept_b, old_b = current[1].chunk(2)
        # differences in fp32, of what the forward pass computes with: then W absorbs them exactly
        left = torch.cat([kept_b.float(), old_b.float() - fresh[1].float()]).t()
        right = torch.cat([old_a.float() - fresh[0].float(), kept_a.float()])
        edit = state.add_product(layer.weight, left, right, layer.merge_scale(), measured)
        parked = item.switched.state.apply(plan)
        for pool, slots, old in zip(pools, parked, (old_a, old_b), strict=True):
            pool.park(slots, old[:, slice(*state.own_span(old.shape[1]))])
        rows, cols = (torch.from_numpy(vectors) for vectors in plan.vectors)
        state.write_vectors(layer.lora_A, rows, fresh[0])
        state.write_vectors(layer.lora_B, cols, fresh[1])
        state.reset_vectors(layer.lora_B, rows, self.config.freeze_steps)
        state.reset_vectors(layer.lora_A, cols, self.config.freeze_steps)
        return edit

    def _note(self, work: Sequence[_Work]) -> None:
        first = next(iter(self._layers.values()))
        if any(item.switched is first for item in work):
            self._pairs.note(first.state.slots)
        # the counterpart of a row of A, n long, is a column of B, m long
        reset = sum(len(item.plan.vectors[0]) * _lengths(item.switched) for item in work)
        elements = sum(self.config.rank * _lengths(each) for each in self._layers.values())
        self._figures.note_switches(sum(item.plan.count for item in work), reset / elements)

    def figures(self, state: TrainState, model: nn.Module) -> dict[str, Any]:
        visited = sum(
            pool.stored + int((pool.places()[held] < 0).sum())
            for switched in self._layers.values()
            for pool, held in zip(switched.pools, switched.state.slots, strict=True)
        )
        return {
            **self._figures.read(),
            "method/candidates_visited": visited,
            "method/candidate_pairs": self._pairs.pairs,
            "method/effective_rank": self._rank.measure(state),
            "method/host_bytes_per_node": state.node_bytes(),
        }

    def replicas(self) -> dict[str, torch.Tensor]:
        """Which candidates are where, and the candidates themselves if every process has its own.

        One that differs elsewhere shows in the factor that it enters.
        """
        found = {}
        for name, switched in self._layers.items():
            for side, held, pool in zip(_SIDES, switched.state.slots, switched.pools, strict=True):
                found[f"{name}.{side} (slots)"] = torch.from_numpy(held)
                found[f"{name}.{side} (places)"] = pool.places()
                if self._own_pools:
                    for number, chunk in enumerate(pool.chunks()):
                        found[f"{name}.{side} (candidates, part {number})"] = chunk
        return found

    def state_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = {
            "cursors": {name: list(s.state.cursors) for name, s in self._layers.items()},
            "switched_vectors": self._figures.switched,
            "pairs": self._pairs.tensor(),
            self._rank.key: self._rank.reference,
        }
        for name, switched in self._layers.items():
            shape = tp_local_shape(switched.layer.weight)
            for side, slots, pool, length in zip(
                _SIDES, switched.state.slots, switched.pools, shape[::-1], strict=True
            ):
                saved[f"{name}.{side}.slots"] = torch.from_numpy(slots)
                saved[f"{name}.{side}.places"] = pool.places()
                for number, chunk in enumerate(pool.chunks()):
                    whole = self._collect(chunk, length)
                    if whole is not None:
                        saved[f"{name}.{side}.vectors.{number}"] = whole
        return saved

    def join_states(
        self, states: Sequence[dict[str, Any]], shards: Sequence[Mapping[str, TPShard]]
    ) -> dict[str, Any]:
        joined = dict(states[0])
        for key, first in states[0].items():
            cut = _cut_of(key, shards[0])
            if cut is None:
                continue
            name, dim = cut
            shape = list(first.shape)
            shape[dim] = shards[0][name].global_shape[shards[0][name].dim]
            joined[key] = first.new_empty(shape)
            for state, held in zip(states, shards, strict=True):
                replace(held[name], dim=dim).place(state[key], joined[key])
        return joined

    def part_of_state(self, state: dict[str, Any], shards: Mapping[str, TPShard]) -> dict[str, Any]:
        own = dict(state)
        for key, whole in state.items():
            cut = _cut_of(key, shards)
            if cut is not None:
                own[key] = replace(shards[cut[0]], dim=cut[1]).part(whole)
        return own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ahead = None
        self._figures.switched = state["switched_vectors"]
        self._pairs.load(state["pairs"])
        self._rank.reference.copy_(state[self._rank.key])
        for name, switched in self._layers.items():
            first, second = state["cursors"][name]
            switched.state.cursors = first, second
            for side, held, pool in zip(_SIDES, switched.state.slots, switched.pools, strict=True):
                held[:] = state[f"{name}.{side}.slots"].numpy()
                chunks, prefix = [], f"{name}.{side}.vectors."
                while f"{prefix}{len(chunks)}" in state:
                    chunks.append(state[f"{prefix}{len(chunks)}"])
                pool.load(state[f"{name}.{side}.places"], chunks)


def _lengths(switched: _Switched) -> int:
    """Of a row of A and a column of B together."""
    return switched.layer.spec.in_features + switched.layer.spec.out_features


def _cut_of(key: str, shards: Mapping[str, TPShard]) -> tuple[str, int] | None:
    """The parameter that an entry of the saved state is cut like, and along which dimension.

    Parked vectors are rows, cut like the vectors of their factor; the reference of the update's
    rank has the rows of its weight.
    """
    layer, _, what = key.partition("_proj.")
    if what == UpdateRank.ENTRY:
        name, dim = f"{layer}_proj.weight", 0
    elif ".vectors." in what:
        name, dim = f"{layer}_proj.lora_{what[0]}", 1
    else:
        return None
    shard = shards.get(name)
    return None if shard is None or shard.inner else (name, dim)
