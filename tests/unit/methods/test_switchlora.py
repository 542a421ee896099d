"""A switch: what it keeps, what it exchanges, what it resets, and what its state holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from relora_ds.config.methods.switchlora import SwitchLoRAConfig
from relora_ds.errors import DivergenceError
from relora_ds.methods.adapter import AdapterLinear
from relora_ds.methods.interface import Report, SavedTensor
from relora_ds.methods.switchlora.plan import switch_counts
from relora_ds.methods.switchlora.switchlora import SwitchLoRA
from relora_ds.numerics.base_weight import Precision, Working
from relora_ds.optim.vector_adamw import VectorAdamW, storage_key
from relora_ds.optim.vector_clock import Fragment, VectorClock
from relora_ds.parallel.linear import LinearSpec
from relora_ds.randomness import Stream
from tests.unit.methods.memory_state import MemoryState, StoredMoments, memory_state

SHAPES = {"first": (20, 12), "second": (12, 20), "third": (16, 16)}
STEPS, RANK, FREEZE = 400, 6, 5


class Run:
    """SwitchLoRA on three projections without an engine."""

    def __init__(
        self,
        precision: Precision = "working",
        round_ending: Callable[[int], int] = lambda step: 1,
        **settings: Any,
    ) -> None:
        values = {"name": "switchlora", "rank": RANK, "interval": 10, "descent_rate": 10.0}
        config = SwitchLoRAConfig.model_validate(values | settings)
        self.method = SwitchLoRA(config, seed=42, steps=STEPS, round_ending=round_ending)
        self.dense, self.model = {}, nn.ModuleDict()
        generator = torch.Generator().manual_seed(0)
        for name, (rows, cols) in SHAPES.items():
            layer = self.method.linear(LinearSpec(name, cols, rows, False, "column"))
            self.dense[name] = torch.randn(rows, cols, generator=generator)
            with torch.no_grad():
                self.method.initialize(layer, self.dense[name])
            self.model[name] = layer
        self.state: MemoryState = memory_state(self.model, precision)
        for parameter, axis in self.method.vector_axes(self.model).items():
            self.state.clocks[parameter] = VectorClock(parameter.shape[axis], axis)
        self.session = self.method.start(self.state, self.model)

    @property
    def layers(self) -> list[AdapterLinear]:
        return [layer for layer in self.model.values() if isinstance(layer, AdapterLinear)]

    @torch.no_grad()
    def switch(self, step: int) -> None:
        self.state.completed = step
        assert self.session.before_step(step) is None

    @torch.no_grad()
    def move(self, seed: int) -> None:
        """Stands in for an update: every live vector moves and has moments."""
        self.state.fill_moments(seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter, clock in self.state.clocks.items():
            change = 0.1 * torch.randn(parameter.shape, generator=generator)
            live = clock.live(self.state.completed)
            parameter += change * (live.unsqueeze(1) if clock.axis == 0 else live)

    def effective(self, layer: AdapterLinear) -> torch.Tensor:
        product = layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        return self.state.exact(layer.weight) + layer.merge_scale() * product

    def effectives(self) -> list[torch.Tensor]:
        return [self.effective(layer) for layer in self.layers]

    def values(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def report(self) -> Report:
        return self.session.report()


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def test_the_wrapped_projection_is_the_dense_one() -> None:
    run = Run()
    for layer in run.layers:
        assert relative(run.effective(layer), run.dense[layer.spec.name].double()) <= 1e-6
        assert layer.scale == 1 / RANK
    assert Run(alpha=3.0).layers[0].scale == 0.5
    assert all(layer.lora_B.any() for layer in run.layers)
    assert not any(layer.lora_B.any() for layer in Run(init="kaiming").layers)


@pytest.mark.parametrize("precision", ["working", "bf16_residual"])
@pytest.mark.parametrize("selection", ["random", "ring"])
def test_every_switch_keeps_the_function(precision: Precision, selection: str) -> None:
    run = Run(precision, selection=selection)
    before, drifts = run.effectives(), []
    for step in range(1, 120):
        run.switch(step)
        for new, old in zip(run.effectives(), before, strict=True):
            assert relative(new, old) <= 1e-6
        if step % 50 == 1:
            drifts.append(run.report().metrics.get("method/function_drift"))
        run.move(step)
        before = run.effectives()
    assert run.session.state_dict()["switched_vectors"] > 200
    assert all(0.0 < drift <= 1e-6 for drift in drifts if drift is not None)
    assert any(drift is not None for drift in drifts)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["working", "bf16_residual"])
def test_two_thousand_switches_add_up_to_nothing(precision: Precision) -> None:
    run = Run(precision, freeze_steps=0, interval=1.5)
    run.method.steps = 2000
    start = run.effectives()
    for step in range(1, 2000):
        run.switch(step)
    assert run.session.state_dict()["switched_vectors"] > 2000
    for end, begin in zip(run.effectives(), start, strict=True):
        assert relative(end, begin) <= 1e-5


def test_bf16_alone_drifts() -> None:
    run = Run("bf16_residual")
    for layer in run.layers:
        working = layer.weight.data.view(-1)
        run.state.bases[layer.weight] = Working(working, working.float())
    start = run.effectives()
    for step in range(1, 200):
        run.switch(step)
    assert max(map(relative, run.effectives(), start)) > 5e-3


def vectors_of(run: Run) -> Counter[bytes]:
    """Every vector of the pools and of the factors."""
    found: Counter[bytes] = Counter()
    for switched in run.session.layers.values():
        layer, slots = switched.layer, range(switched.selection.num_slots)
        for pool, held, rows in zip(
            switched.pools,
            switched.state.slots,
            (layer.lora_A.detach(), layer.lora_B.detach().t()),
            strict=True,
        ):
            parked = [slot for slot in slots if slot not in held]
            found.update(v.numpy().tobytes() for v in pool.take(torch.tensor(parked).numpy()))
            found.update(v.contiguous().numpy().tobytes() for v in rows)
    return found


@pytest.mark.parametrize("selection", ["random", "ring"])
def test_no_vector_is_lost_or_doubled(selection: str) -> None:
    run = Run(selection=selection)
    before = vectors_of(run)
    assert max(before.values()) == 1
    for step in range(1, 100):
        run.switch(step)
        assert vectors_of(run) == before
    assert run.report().metrics["method/switched_vectors"] > 150


def test_counterparts_alone_are_reset() -> None:
    run = Run()
    for step in range(1, 60):
        run.move(step)
        slots = {n: [s.copy() for s in x.state.slots] for n, x in run.session.layers.items()}
        before = {p: StoredMoments(m.exp_avg.clone(), m.exp_avg_sq.clone()) for p, m in _items(run)}
        born = {p: c.ages(step).clone() for p, c in run.state.clocks.items()}
        run.switch(step)
        for name, switched in run.session.layers.items():
            layer = switched.layer
            rows, cols = (
                torch.from_numpy((old != new).nonzero()[0])
                for old, new in zip(slots[name], switched.state.slots, strict=True)
            )
            for factor, reset, axis in ((layer.lora_A, cols, 0), (layer.lora_B, rows, 1)):
                keep = torch.ones(RANK, dtype=torch.bool)
                keep[reset] = False
                for key in ("exp_avg", "exp_avg_sq"):
                    new, old = getattr(run.state.stored[factor], key), getattr(before[factor], key)
                    assert not new.index_select(axis, reset).any()
                    kept = keep.nonzero().flatten()
                    assert torch.equal(new.index_select(axis, kept), old.index_select(axis, kept))
                clock = run.state.clocks[factor]
                assert not clock.ages(step)[reset].any()
                assert torch.equal(clock.ages(step)[keep], born[factor][keep])
                for done in range(step, step + FREEZE):
                    assert not clock.live(done)[reset].any()
                assert clock.live(step + FREEZE)[reset].all()


def _items(run: Run) -> list[tuple[nn.Parameter, StoredMoments]]:
    return list(run.state.stored.items())


def test_frozen_vectors_rest_for_exactly_five_updates() -> None:
    run = Run(interval=30)
    optimizer = VectorAdamW(run.state.clocks, lr=1e-2, weight_decay=0.1)
    optimizer.fragments = {
        storage_key(p): [Fragment(0, 0, p.numel(), clock, p.shape[1])]
        for p, clock in run.state.clocks.items()
    }
    first_moves = []
    for step in range(60):
        if step:
            run.switch(step)
        before = run.values()
        for number, parameter in enumerate(run.state.clocks):
            parameter.grad = torch.ones_like(parameter) * (1 + number)
        optimizer.step()
        for name, parameter in run.model.named_parameters():
            if parameter not in run.state.clocks:
                continue
            state, clock = optimizer.state[parameter], run.state.clocks[parameter]
            run.state.stored[parameter] = StoredMoments(state["exp_avg"], state["exp_avg_sq"])
            value, axis = parameter.detach(), clock.axis
            same = (value == before[name]).all(dim=1 - axis)
            assert torch.equal(same, ~clock.live(step))
            sixth = (clock.ages(step + 1) == FREEZE + 1).nonzero().flatten()
            if step > FREEZE and len(sixth):
                moved = (before[name] * (1 - 1e-3) - value).index_select(axis, sixth)
                first_moves.append(float(moved.mean()) / 1e-2)
    # the first live update is the sixth since the switch
    assert first_moves == pytest.approx([0.522] * len(first_moves), abs=1e-3)
    assert first_moves


def test_what_is_due_in_a_round_is_switched_at_its_end() -> None:
    run = Run(round_ending=lambda step: 4 * (step % 4 == 0), interval=20, freeze_steps=2)
    config, expected = run.method.config, 0
    for step in range(1, 81):
        before, function = run.values(), run.effectives()
        run.switch(step)
        changed = {n for n, value in run.values().items() if not torch.equal(value, before[n])}
        counts = [0]
        if step % 4 == 0:
            due = config.switches_between(step - 4, step, STEPS)
            counts = switch_counts(due, len(SHAPES), 42, step)
        expected += 2 * sum(counts)
        assert bool(changed) == any(counts), step
        assert run.session.state_dict()["switched_vectors"] == expected
        assert all(map(lambda a, b: relative(a, b) <= 1e-6, run.effectives(), function))
        run.move(step)
    assert expected > 100


def test_initial_distributions() -> None:
    rows, cols, rank = 600, 400, 100
    config = SwitchLoRAConfig(name="switchlora", rank=rank)
    method = SwitchLoRA(config, seed=3, steps=10)
    layer = method.linear(LinearSpec("q", cols, rows, False, "column"))
    with torch.no_grad():
        method.initialize(layer, torch.zeros(rows, cols))
    assert isinstance(layer, AdapterLinear)
    model = nn.ModuleDict({"q": layer})
    state = memory_state(model, "working")
    pools = method.start(state, model).layers["q"].pools
    gain = 1 / math.sqrt(3)
    std_a = (math.sqrt(rows) * rank / cols**1.5) ** 0.25 * math.sqrt(gain)
    std_b = (rank / math.sqrt(rows * cols)) ** 0.25 * math.sqrt(gain)
    slots = torch.arange(cols - rank).numpy()
    drawn = pools[0].take(slots), pools[1].take(slots)
    for values, std in (
        (layer.lora_A.detach(), std_a),
        (layer.lora_B.detach(), std_b),
        (drawn[0], std_a),
        (drawn[1], std_b),
    ):
        assert float(values.std()) == pytest.approx(std, rel=0.01)
        assert float(values.abs().max()) <= math.sqrt(3) * std
    x = torch.randn(2000, cols, generator=torch.Generator().manual_seed(1))
    out = layer.scale * x @ layer.lora_A.detach().t() @ layer.lora_B.detach().t()
    assert float(out.var() / x.var()) == pytest.approx(1 / 3, rel=0.05)
    assert len(torch.unique(drawn[0])) > 0.99 * min(drawn[0].numel(), 2**24) - 2000


def test_the_update_outgrows_the_rank_of_the_adapters() -> None:
    run = Run()
    layer = run.layers[2]
    start = run.effective(layer)
    ranks = [run.report().metrics["method/effective_rank"]]
    for step in range(1, 80):
        run.switch(step)
        run.move(step)
        if step in (1, 79):
            ranks.append(run.report().metrics["method/effective_rank"])
    values = torch.linalg.svdvals(run.effective(layer) - start)
    assert float(values[15] / values[0]) > 1e-4
    assert ranks[0] == 0.0
    assert 0.0 < ranks[1] <= 2 * RANK
    assert ranks[2] > RANK


def test_where_candidates_wait_makes_no_difference() -> None:
    runs = Run(candidates="host"), Run(candidates="device")
    for step in range(1, 80):
        for run in runs:
            run.switch(step)
            run.move(step)
    host, device = (run.values() for run in runs)
    assert all(torch.equal(value, device[name]) for name, value in host.items())
    assert runs[0].report().metrics["method/host_bytes_per_node"] > 0
    assert runs[1].report().metrics["method/host_bytes_per_node"] == 0


def test_nothing_happens_before_the_first_update() -> None:
    run = Run()
    before = run.values()
    run.switch(0)
    assert all(torch.equal(value, before[name]) for name, value in run.values().items())
    assert run.report().event is None


@pytest.mark.parametrize("at", [1, 37, 38, 90])
@pytest.mark.parametrize("selection", ["random", "ring"])
def test_a_restored_run_goes_on_bit_for_bit(at: int, selection: str) -> None:
    run, again = Run(selection=selection), Run(selection=selection)
    for step in range(1, at):
        run.switch(step)
        run.move(step)
    saved = _saved(run)
    with torch.no_grad():
        for own, other in zip(again.model.parameters(), run.model.parameters(), strict=True):
            own.copy_(other)
            if other in run.state.clocks:
                for key, tensor in run.state.clocks[other].tensors().items():
                    again.state.clocks[own].tensors()[key].copy_(tensor)
                again.state.clocks[own].refresh()
    again.session.load_state_dict(saved)
    for step in range(at, at + 40):
        for each in (run, again):
            each.switch(step)
            each.move(step)
    first, second = run.values(), again.values()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    last, found = run.report().metrics, again.report().metrics
    for key in ("switched_vectors", "candidates_visited", "candidate_pairs", "effective_rank"):
        assert found[f"method/{key}"] == last[f"method/{key}"]


def _saved(run: Run) -> dict[str, Any]:
    """What a checkpoint would hold: plain values, and copies of tensors."""
    return {
        key: value.value.clone() if isinstance(value, SavedTensor) else value
        for key, value in run.session.state_dict().items()
    }


def test_figures_of_a_line() -> None:
    run = Run()
    for step in range(1, 12):
        run.switch(step)
    report = run.report()
    assert report.event == "switch"
    first = report.metrics
    assert 0.0 < first["method/moments_reset_fraction"] < 1.0
    assert 0.0 < first["method/function_drift"] <= 1e-6
    assert first["method/switch_bytes"] == 0
    switched = first["method/switched_vectors"]
    assert first["method/candidates_visited"] == switched + 6 * RANK
    assert RANK < first["method/candidate_pairs"] <= RANK + switched
    assert run.report().event is None


def test_a_lost_switch_is_refused() -> None:
    run = Run(interval=2, freeze_steps=0)
    for layer in run.layers:
        layer.weight.data.fill_(1.0)
        layer.lora_B.data.mul_(1e-12)
    for switched in run.session.layers.values():
        for pool in switched.pools:
            pool.draw = replace(pool.draw, bound=1e-12)
    with pytest.raises(DivergenceError, match=r"the switch changed no element"):
        run.switch(1)


def test_candidates_are_drawn_by_layer_and_side() -> None:
    run = Run()
    drawn = [
        pool.take(torch.tensor([0]).numpy())[0, :12]
        for switched in run.session.layers.values()
        for pool in switched.pools
    ]
    assert len({tuple(v.div(v.abs().max()).tolist()) for v in drawn}) == len(drawn)
    stream = Stream(42, "candidate_A", "first")
    bound = float(run.layers[0].lora_A.detach().abs().max())
    expected = stream.uniform(0, 12) * 2 - 1
    assert drawn[0].div(expected).std() < 1e-5 * bound + 1e-6
