"""GaLore on plain tensors: the layer, the bases, its settings, and its session."""

from __future__ import annotations

import json
import weakref
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from relora_ds.config.load import load_run_config
from relora_ds.config.methods.galore import GaLoreConfig
from relora_ds.config.schema import RunConfig
from relora_ds.errors import ConfigError
from relora_ds.methods.build import build_model
from relora_ds.methods.galore.basis import choice_bytes, leading_basis
from relora_ds.methods.galore.choice import BasisChoice
from relora_ds.methods.galore.galore import GaLoreSession, galore_layers
from relora_ds.methods.galore.layer import GaLoreLinear
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.model.llama import Llama
from relora_ds.numerics.base_weight import Working
from relora_ds.parallel.linear import LinearSpec
from relora_ds.randomness import Stream
from tests.harness.build import TINY, batches, run_config
from tests.unit.methods.memory_state import MemoryState, StoredMoments

STREAM = Stream(1, "basis")


def layer_of(rows: int, cols: int, rank: int, right: bool) -> GaLoreLinear:
    draw, spec = torch.Generator().manual_seed(rows), LinearSpec("a", cols, rows, False, "column")
    layer = GaLoreLinear(spec, rank, right).double()
    for parameter in layer.parameters():
        parameter.data.normal_(generator=draw)
    return layer


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize(("rows", "cols"), [(9, 5), (5, 9), (6, 6)])
def test_the_factor_gets_the_projected_gradient_and_the_sink_the_whole(
    rows: int, cols: int, right: bool
) -> None:
    layer, x = layer_of(rows, cols, 3, right), torch.randn(2, 4, cols, dtype=torch.float64)
    x.requires_grad_()
    first, second = layer.factors(layer.projected, layer.basis)
    dense = (layer.weight + first @ second).detach().requires_grad_()
    taken: list[torch.Tensor] = []
    layer.sink = taken.append
    out = layer(x)
    torch.testing.assert_close(out, F.linear(x, dense))
    (grad_x,) = torch.autograd.grad(out.pow(3).sum(), x, retain_graph=True)
    wanted_x, wanted = torch.autograd.grad(F.linear(x, dense).pow(3).sum(), (x, dense))
    torch.testing.assert_close(grad_x, wanted_x)
    torch.testing.assert_close(taken[-1], wanted)
    (grad,) = torch.autograd.grad(out.pow(3).sum(), layer.projected)
    torch.testing.assert_close(grad, (wanted if right else wanted.t()) @ layer.basis.t())


@pytest.mark.parametrize("svd", ["exact", "randomised"])
@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_a_basis_spans_the_leading_directions_of_its_side(
    svd: Any, shape: tuple[int, int], right: bool
) -> None:
    low = torch.randn(shape[0], 3) @ torch.randn(3, shape[1])
    gradient = low + 1e-4 * torch.randn(shape)
    basis = leading_basis(gradient, 3, svd, STREAM, right)
    assert basis.shape == (3, shape[1] if right else shape[0])
    torch.testing.assert_close(basis @ basis.t(), torch.eye(3), atol=1e-5, rtol=0)
    side = gradient if right else gradient.t()
    left = side - side @ basis.t() @ basis
    assert float(left.norm()) <= 1e-2 * float(side.norm())
    assert bool((basis.gather(1, basis.abs().argmax(1, keepdim=True)) > 0).all())
    again = leading_basis(gradient, 3, svd, STREAM, right)
    assert torch.equal(basis, again)


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_a_long_side_has_as_many_directions_as_are_asked_for(svd: Any) -> None:
    """Also where the gradient has fewer: they stay orthonormal, and the leading one comes first."""
    gradient = torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 10.0))
    basis = leading_basis(gradient, 3, svd, STREAM, right=True)
    torch.testing.assert_close(basis @ basis.t(), torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis[0], F.normalize(torch.arange(1.0, 10.0), dim=0))


def test_which_side_a_subspace_lies_along() -> None:
    shapes = [(3, 2), (2, 3), (2, 2)]
    found = {}
    for side in ("shorter", "longer", "left", "right"):
        method = config_of(side=side).method
        assert isinstance(method, GaLoreConfig)
        found[side] = [method.is_right(m, n) for m, n in shapes]
    assert found == {
        "shorter": [True, False, True],
        "longer": [False, True, True],
        "left": [False, False, False],
        "right": [True, True, True],
    }


@pytest.mark.parametrize(("rows", "cols"), [(9, 5), (5, 9), (6, 6)])
def test_with_all_directions_and_plain_descent_it_is_full_rank(rows: int, cols: int) -> None:
    rank, rate, right = min(rows, cols), 0.05, rows >= cols
    layer, draw = layer_of(rows, cols, rank, right), torch.Generator().manual_seed(5)
    layer.projected.data.zero_()
    dense = layer.weight.detach().clone().requires_grad_()
    for step in range(6):
        x = torch.randn(4, cols, dtype=torch.float64, generator=draw)
        (grad,) = torch.autograd.grad(F.linear(x, dense).pow(2).sum(), dense)
        if step % 3 == 0:  # a refresh
            basis = leading_basis(grad.float(), rank, "exact", STREAM, right)
            first, second = layer.factors(layer.projected.detach(), layer.basis)
            layer.weight.data += first @ second
            layer.projected.data.zero_()
            layer.basis.data.copy_(torch.linalg.qr(basis.double().t()).Q.t())
        (low,) = torch.autograd.grad(layer(x).pow(2).sum(), layer.projected)
        layer.projected.data -= rate * low
        dense.data -= rate * grad
    first, second = layer.factors(layer.projected, layer.basis)
    torch.testing.assert_close(layer.weight + first @ second, dense, rtol=1e-5, atol=1e-8)


def test_a_random_basis_leaves_the_generator_of_the_process_alone() -> None:
    before = torch.get_rng_state()
    leading_basis(torch.randn(8, 6, generator=torch.Generator()), 2, "randomised", STREAM, True)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_a_gradient_without_direction_has_no_basis(value: float) -> None:
    gradient = torch.zeros(6, 4)
    gradient[1, 2] = value
    for svd in get_args(GaLoreConfig.model_fields["svd"].annotation):
        basis = leading_basis(gradient, 2, svd, STREAM, True)
        assert basis.shape == (2, 4)
        assert bool(basis.isnan().all())


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_gradients_of_any_size_have_a_basis(size: float) -> None:
    gradient = torch.randn(6, 4)
    scaled = leading_basis(gradient * size, 2, "exact", STREAM, True)
    basis = leading_basis(gradient, 2, "exact", STREAM, True)
    torch.testing.assert_close(scaled, basis, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("svd", ["exact", "randomised"])
@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize("shape", [(256, 256), (192, 640)])
def test_a_choice_takes_the_memory_that_planning_counts(
    shape: tuple[int, int], right: bool, svd: Any, tmp_path: Path
) -> None:
    gradient, trace = torch.randn(shape), tmp_path / "trace.json"
    leading_basis(gradient, 32, svd, STREAM, right)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        leading_basis(gradient, 32, svd, STREAM, right)
    watched.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    grown = (e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"]))
    assert max(accumulate(grown)) == pytest.approx(choice_bytes(*shape, 32, svd, right), rel=0.1)


def config_of(**settings: object) -> RunConfig:
    return run_config({"name": "galore", "rank": 4, "update_every": 5, **settings})


def session_of(config: RunConfig) -> tuple[GaLoreSession, MemoryState, Llama]:
    """A session on plain tensors, whose moments are random."""
    method = plan_phases(config)[-1].method
    source = InitialWeights(TINY, config.train.seed)
    model = build_model(TINY, method, config.train, source, torch.device("cpu"))
    state = MemoryState()
    for layer in galore_layers(model).values():
        weight = layer.weight
        state.bases[weight] = Working(weight.data.view(-1), weight.detach().clone().view(-1))
        shape = layer.projected.shape
        state.stored[layer.projected] = StoredMoments(torch.randn(shape), torch.rand(shape))
    tokens = batches(1)[0]
    state.gradients.batch = lambda: [tokens]
    gradients: Any = state.gradients
    gradients.run_pass = lambda tokens: model(tokens).backward()
    session = method.start(state, model)
    assert isinstance(session, GaLoreSession)
    return session, state, model


def test_a_refresh_keeps_the_function_and_carries_the_moments_over() -> None:
    session, state, model = session_of(config_of())
    tokens = batches(1)[0]
    with torch.no_grad():
        session.before_step(0)
        for layer in galore_layers(model).values():
            layer.projected.normal_(std=0.01)
            layer.basis.copy_(torch.linalg.qr(torch.randn(layer.basis.shape).t()).Q.t())
        loss = model(tokens)
        old = {name: layer.basis.clone() for name, layer in galore_layers(model).items()}
        moments = {p: (m.exp_avg, m.exp_avg_sq) for p, m in state.stored.items()}
        state.completed = 5
        assert session.before_step(4) is None
        event = session.before_step(5)
        assert event is not None
        assert event.kind == "refresh"
        assert event.moments_reset_fraction == 0.0
        assert event.function_drift <= 1e-6
        torch.testing.assert_close(model(tokens), loss, atol=0, rtol=1e-6)
    for name, layer in galore_layers(model).items():
        assert not layer.projected.any()
        turn = old[name] @ layer.basis.t()
        first, second = moments[layer.projected]
        torch.testing.assert_close(state.stored[layer.projected].exp_avg, first @ turn)
        torch.testing.assert_close(state.stored[layer.projected].exp_avg_sq, second @ turn.square())


def test_published_moments_stay_as_they_are() -> None:
    session, state, _ = session_of(config_of(transport="none"))
    moments = {p: m.exp_avg.clone() for p, m in state.stored.items()}
    state.completed = 5
    with torch.no_grad():
        assert session.before_step(5) is not None
    assert all(torch.equal(state.stored[p].exp_avg, value) for p, value in moments.items())


def test_a_batch_that_is_left_out_chooses_no_basis_and_the_next_one_does() -> None:
    session, state, model = session_of(config_of())
    offered, state.gradients.batch = state.gradients.batch, tuple
    before = {name: layer.basis.clone() for name, layer in galore_layers(model).items()}
    with torch.no_grad():
        assert session.before_step(0) is None
    after = {name: layer.basis for name, layer in galore_layers(model).items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    resumed, state, _ = session_of(config_of())
    state.gradients.batch = offered
    resumed.load_state_dict(session.state_dict())
    with torch.no_grad():
        assert resumed.before_step(1) is not None
        assert resumed.before_step(2) is None


def test_weights_without_gradient_keep_basis_moments_and_function() -> None:
    session, state, model = session_of(config_of())
    layers = galore_layers(model)
    state.completed = 5
    with torch.no_grad():
        model.lm_head.weight.zero_()
        first = next(iter(layers.values()))
        first.projected.fill_(0.5)
        dense = session.method.dense_weight(first)
        bases = [layer.basis.clone() for layer in layers.values()]
        moments = state.stored[first.projected].exp_avg.clone()
        event = session.before_step(5)
        assert event is not None
        assert event.details["method/kept_bases"] == len(layers)
        torch.testing.assert_close(session.method.dense_weight(first), dense)
    assert all(torch.equal(x.basis, old) for x, old in zip(layers.values(), bases, strict=True))
    torch.testing.assert_close(state.stored[first.projected].exp_avg, moments)


def test_one_gradient_is_whole_at_a_time() -> None:
    _, state, model = session_of(config_of())
    layers, seen = galore_layers(model), []

    def choose(name: str, gradient: torch.Tensor) -> torch.Tensor:
        assert not any(earlier() is not None for earlier in seen), name
        assert gradient.shape == layers[name].weight.shape
        seen.append(weakref.ref(gradient))
        return torch.zeros(layers[name].basis.shape)

    choice = BasisChoice(layers, state.gradients, choose)
    assert choice.run()
    assert len(seen) == len(choice.chosen) == len(layers)


def test_the_scale_multiplies_the_rate_of_the_projections_alone() -> None:
    phase = plan_phases(config_of(scale=0.25, warm_start_steps=0))[-1]
    assert phase.adapter_lr == pytest.approx(0.25 * config_of().optimizer.lr)
    warm = plan_phases(config_of(scale=0.25, warm_start_steps=3))[0]
    assert warm.adapter_lr == pytest.approx(config_of().optimizer.lr)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["optimizer.weight_decay=0.1"], "optimizer.weight_decay"),
        (["optimizer.name=adamw8bit"], "method.transport"),
        (["parallel.tensor=2", "parallel.low_rank_plan=act"], "parallel.low_rank_plan"),
    ],
)
def test_what_it_cannot_do_is_refused(overrides: list[str], key: str) -> None:
    path = "configs/run/llama_60m_galore.yaml"
    with pytest.raises(ConfigError, match=key):
        load_run_config(path, overrides)


@pytest.mark.parametrize("plan", ["auto", "fold"])
def test_plans_that_leave_the_rank_whole_are_accepted(plan: str) -> None:
    path = "configs/run/llama_60m_galore.yaml"
    load_run_config(path, ["parallel.tensor=2", f"parallel.low_rank_plan={plan}"])
