"""A ReLoRA restart: what it keeps, what it changes, when it happens and when it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from relora_ds.errors import DivergenceError
from relora_ds.methods import train_state
from relora_ds.methods.adapter import AdapterLinear
from relora_ds.methods.interface import Event
from relora_ds.methods.relora.relora import ReLoRA
from relora_ds.numerics.base_weight import Precision, Working
from tests.unit.methods.memory_state import MemoryState, MemoryWeights, memory_state

Build = Callable[..., tuple[ReLoRA, nn.ModuleDict]]


def layers_of(model: nn.ModuleDict) -> list[AdapterLinear]:
    return [layer for layer in model.values() if isinstance(layer, AdapterLinear)]


def train(model: nn.ModuleDict, state: MemoryState, seed: int = 0) -> None:
    """Stands in for training: every trained parameter moves and has moments."""
    state.fill_moments(seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def merge(method: ReLoRA, state: MemoryState, model: nn.ModuleDict, step: int = 10) -> Event:
    event = method.start(state, model).after_step(step)
    assert event is not None
    return event


def effective(state: MemoryState, layer: AdapterLinear) -> torch.Tensor:
    """W + s B A in float64, from the authoritative W and the factors that the layer works with."""
    product = layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    return state.exact(layer.weight) + layer.merge_scale() * product


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("precision", ["working", "bf16_residual"])
@pytest.mark.parametrize("init", ["kaiming", "balanced"])
@pytest.mark.parametrize("trainable_scaling", [False, True])
def test_a_restart_keeps_the_function(
    relora: Build, precision: Precision, init: str, trainable_scaling: bool
) -> None:
    method, model = relora(init=init, trainable_scaling=trainable_scaling)
    state = memory_state(model, precision)
    for number in (1, 2, 3):
        train(model, state, number)
        before = [effective(state, layer) for layer in layers_of(model)]
        factors = [layer.lora_A.detach().clone() for layer in layers_of(model)]
        event = merge(method, state, model, 10 * number)
        for layer, old, lora_a in zip(layers_of(model), before, factors, strict=True):
            assert relative(effective(state, layer), old) < 1e-6
            assert bool((layer.lora_B == 0).all()) is (init == "kaiming")
            assert not torch.equal(layer.lora_A, lora_a)
            if init == "kaiming":
                bound = 1.0 / math.sqrt(layer.lora_A.shape[1])
                assert float(layer.lora_A.detach().abs().max()) <= bound * (1 + 2**-8)
        assert event.kind == "merge"
        assert 0.0 < event.function_drift < 1e-6
        assert event.moments_reset_fraction == 1.0
        assert event.details["method/merges"] == number
        assert event.details["method/lost_update"] < 1e-4


def test_bf16_alone_loses_part_of_a_merge(relora: Build) -> None:
    method, model = relora()
    state = memory_state(model, "bf16_residual")
    for layer in layers_of(model):
        working = layer.weight.data.view(-1)
        state.bases[layer.weight] = Working(working, working.float())
    for layer in layers_of(model):
        layer.lora_B.data += 1e-3
    event = merge(method, state, model)
    assert event.function_drift > 1e-4
    assert event.details["method/lost_update"] > 0.05


def test_accumulated_rank_grows_by_r_per_restart(relora: Build) -> None:
    method, model = relora()
    state = memory_state(model, "working")
    layer = layers_of(model)[2]
    start = state.exact(layer.weight)
    for number in (1, 2, 3, 4, 5):
        train(model, state, number)
        merge(method, state, model, 10 * number)
        values = torch.linalg.svdvals(state.exact(layer.weight) - start)
        rank = min(4 * number, 16)
        assert float(values[rank - 1] / values[0]) > 1e-3
        assert rank == 16 or float(values[rank] / values[0]) < 1e-6


def test_training_goes_on_through_b_after_a_restart(relora: Build) -> None:
    method, model = relora()
    state = memory_state(model, "working")
    train(model, state)
    merge(method, state, model)
    for layer in layers_of(model):
        x = torch.randn(5, layer.lora_A.shape[1], generator=torch.Generator().manual_seed(1))
        layer(x).square().sum().backward()
        assert layer.lora_B.grad is not None
        assert layer.lora_A.grad is not None
        assert layer.lora_B.grad.any(dim=0).all()
        assert not layer.lora_A.grad.any()


def test_trained_scaling_is_alive_after_a_restart(relora: Build) -> None:
    method, model = relora(trainable_scaling=True)
    state = memory_state(model, "working")
    train(model, state)
    merge(method, state, model)
    for layer in layers_of(model):
        assert layer.scaling is not None
        assert layer.scaling.tolist() == [1.0]
        layer(torch.ones(1, layer.lora_A.shape[1])).sum().backward()
        assert layer.lora_B.grad is not None
        assert layer.lora_B.grad.any()


def test_balanced_restart_from_a_scaling_of_zero(relora: Build) -> None:
    method, model = relora(init="balanced", trainable_scaling=True)
    state = memory_state(model, "working")
    train(model, state)
    for layer in layers_of(model):
        assert layer.scaling is not None
        layer.scaling.data.zero_()
    before = [effective(state, layer) for layer in layers_of(model)]
    merge(method, state, model)
    for layer, old in zip(layers_of(model), before, strict=True):
        assert relative(effective(state, layer), old) < 1e-6


def test_draws_of_every_restart_and_layer_differ(relora: Build) -> None:
    method, model = relora()
    state = memory_state(model, "working")
    drawn = [layer.lora_A.detach()[:, :12].clone() for layer in layers_of(model)]
    for number in (1, 2):
        train(model, state)
        merge(method, state, model, 10 * number)
        drawn += [layer.lora_A.detach()[:, :12].clone() for layer in layers_of(model)]
    assert torch.unique(torch.stack(drawn).flatten(1), dim=0).shape[0] == 9


def test_merge_steps(relora: Build) -> None:
    method, _ = relora(merge_every=10)
    merges = [step for step in range(-5, 130) if method.is_merge_step(step)]
    assert merges == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    for every in (1, 7, 33, 99, 100, 101):
        method, _ = relora(merge_every=every)
        count = sum(method.is_merge_step(step) for step in range(101))
        assert count == 99 // every


@pytest.mark.parametrize("step", [0, 1, 9, 11, 100])
def test_nothing_happens_at_other_steps(relora: Build, step: int) -> None:
    method, model = relora()
    state = memory_state(model, "working")
    train(model, state)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    session = method.start(state, model)
    assert session.before_step(step) is None
    assert session.after_step(step) is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(moments.exp_avg.any() for moments in state.stored.values())
    assert not state.restarted


@pytest.mark.parametrize("trainable_scaling", [False, True])
def test_steps_of_every_adapter_are_reset_once(relora: Build, trainable_scaling: bool) -> None:
    method, model = relora(trainable_scaling=trainable_scaling)
    state = memory_state(model, "working")
    train(model, state)
    merge(method, state, model)
    adapters = {id(p) for p in model.parameters() if p.requires_grad}
    assert [id(p) for p in state.restarted] == list(dict.fromkeys(id(p) for p in state.restarted))
    assert (
        {id(p) for p in state.restarted} == adapters == {id(p) for p in method.vector_axes(model)}
    )
    for parameter, axis in method.vector_axes(model).items():
        assert parameter.shape[axis] == (1 if parameter.ndim == 1 else 4)


def test_steps_are_kept_on_request(relora: Build) -> None:
    method, model = relora(reset={"steps": False})
    state = memory_state(model, "working")
    train(model, state)
    assert method.vector_axes(model) == {}
    merge(method, state, model)
    assert not state.restarted


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_lost_merge_is_refused_with_a_remedy_for_its_precision(
    relora: Build, precision: str
) -> None:
    method, model = relora()
    state = memory_state(model, "working")
    train(model, state)
    layer = layers_of(model)[1]
    if precision == "bf16":
        for each in layers_of(model):
            each.weight.data = each.weight.data.bfloat16()
            working = each.weight.data.view(-1)
            state.bases[each.weight] = Working(working, working.float())
    layer.weight.data.fill_(1.0)
    layer.lora_B.data *= 1e-12
    with pytest.raises(DivergenceError, match=r"second\.weight \(1 of 3 projections\)") as caught:
        merge(method, state, model)
    assert "optimizer.adapter_lr" in str(caught.value)
    assert ("base_precision" in str(caught.value)) is (precision == "bf16")


def test_a_merge_of_nothing_is_not_a_lost_one(relora: Build) -> None:
    method, model = relora()
    state = memory_state(model, "working")
    before = [layer.weight.detach().clone() for layer in layers_of(model)]
    event = merge(method, state, model)
    assert event.details["method/lost_update"] == 0.0
    assert all(
        torch.equal(layer.weight, old) for layer, old in zip(layers_of(model), before, strict=True)
    )


def test_adapters_without_moments_are_refused(relora: Build) -> None:
    method, model = relora()
    state = memory_state(model, "working")
    train(model, state)
    state.stored.clear()
    with pytest.raises(DivergenceError, match="no gradient"):
        merge(method, state, model)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["zero", "random", "magnitude"])
def test_a_cycle_without_an_applied_update_is_not_merged(relora: Build, mode: str) -> None:
    method, model = relora(reset={"mode": mode, "fraction": 0.5})
    state = memory_state(model, "working")
    train(model, state)
    session = method.start(state, model)
    assert session.after_step(10) is not None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [(m.exp_avg.clone(), m.exp_avg_sq.clone()) for m in state.stored.values()]
    # another process goes on with it, and skips a whole cycle
    resumed = method.start(state, model)
    resumed.load_state_dict(session.state_dict())
    assert resumed.after_step(20) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for (first, second), now in zip(moments, state.stored.values(), strict=True):
        assert torch.equal(now.exp_avg, first)
        assert torch.equal(now.exp_avg_sq, second)
    train(model, state, seed=1)
    event = resumed.after_step(30)
    assert event is not None
    assert event.details["method/merges"] == 3.0


def test_a_first_cycle_without_an_applied_update_is_not_merged(relora: Build) -> None:
    method, model = relora()
    state = memory_state(model, "working")
    state.stored.clear()
    state.completed = 0
    assert method.start(state, model).after_step(10) is None


@torch.no_grad()
def test_a_run_that_goes_on_makes_up_for_the_merge_at_its_old_end(relora: Build) -> None:
    method, model = relora()
    state = memory_state(model, "working")
    train(model, state)
    ended = type(method)(method.config, method.seed, steps=10).start(state, model)
    assert ended.after_step(10) is None, "the run ends here"
    longer = method.start(state, model)
    longer.load_state_dict(ended.state_dict())
    event = longer.before_step(10)
    assert event is not None
    assert event.details["method/merges"] == 1.0
    assert longer.before_step(10) is None, "once"
    resumed = method.start(state, model)
    resumed.load_state_dict(longer.state_dict())
    assert resumed.before_step(10) is None, "and not when what was saved after it is resumed"
    unknown = method.start(state, model)
    unknown.load_state_dict({})
    assert unknown.before_step(10) is None


@torch.no_grad()
def test_a_checkpoint_that_does_not_count_updates_is_merged_as_ever(relora: Build) -> None:
    method, model = relora()
    state = memory_state(model, "working")
    train(model, state)
    session = method.start(state, model)
    session.load_state_dict({})
    assert session.after_step(10) is not None


@pytest.mark.parametrize("precision", ["working", "bf16_residual"])
def test_the_working_output_is_probed(relora: Build, precision: Precision) -> None:
    method, model = relora()
    state = memory_state(model, precision)
    train(model, state)
    layer = layers_of(model)[0]
    x = torch.ones(2, 12, dtype=layer.weight.dtype)
    state.probe_output = lambda: layer(x).float().detach()
    drift = merge(method, state, model).details["method/output_drift"]
    assert 0.0 < drift < (1e-6 if precision == "working" else 2e-2)


def test_edited_weights_are_the_frozen_ones(relora: Build) -> None:
    method, model = relora()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    edited: list[Any] = method.edited_weights(model)
    assert [id(p) for p in edited] == [id(p) for p in frozen]


@pytest.mark.parametrize(("budget", "exchanges"), [(1, 3), (100, 2), (1 << 20, 1)])
def test_values_are_gathered_in_few_exchanges_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch, budget: int, exchanges: int
) -> None:
    asked: list[int] = []

    class Counting(MemoryWeights):
        def gather(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
            asked.append(sum(p.numel() for p in parameters))
            return super().gather(parameters)

    monkeypatch.setattr(train_state, "_GATHERED_BYTES", budget)
    requests = [[nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))] for _ in range(3)]
    found = list(Counting({}).gather_in_turn(requests))
    assert len(asked) == exchanges
    assert sum(asked) == 30
    for values, parameters in zip(found, requests, strict=True):
        assert all(map(torch.equal, values, parameters))
