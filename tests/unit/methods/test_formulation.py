"""How projections compute: what each way costs, which one is taken, and that all are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from pydantic import TypeAdapter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from relora_ds.config.methods.catalogue import MethodConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.methods.adapter import AdapterLinear
from relora_ds.methods.formulation.choice import (
    Choice,
    Form,
    GradientForm,
    ProductSize,
    Rates,
    choose,
    operations,
    product_size,
    rates_of,
    seconds,
    update_of,
)
from relora_ds.methods.registry import METHODS
from relora_ds.parallel.footprint import Formulation, UpdateSize
from relora_ds.parallel.linear import LinearSpec, Projection, weights_stay

Spec = Callable[..., LinearSpec]
FORMS: tuple[Form, ...] = ("split", "layer", "step")
GRADIENTS: tuple[GradientForm, ...] = ("low_rank", "dense")
WAYS: list[tuple[Form, GradientForm]] = [
    (form, each) for form in FORMS for each in GRADIENTS if (form, each) != ("split", "dense")
]
"""A split form has low-rank gradients."""
ONLY_OPERATIONS = Rates(1.0, 1e30, 1e30, 0.0, 1.0)
HOST = rates_of("cpu", torch.float32)
RANK = 3


def adapter(spec: LinearSpec, dtype: torch.dtype = torch.float64, **settings: Any) -> AdapterLinear:
    """A layer of which every parameter is non-zero."""
    values = {"name": "lora", "rank": RANK, "alpha": 8, **settings}
    config = TypeAdapter(MethodConfig).validate_python(values)
    layer = METHODS["lora"](cast(Any, config), 1, 9).linear(spec)
    assert isinstance(layer, AdapterLinear)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = (0.5 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return layer


def error(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """Relative, in norm."""
    assert found is not None
    assert expected is not None
    return float((found.double() - expected).norm() / expected.norm())


def forced(monkeypatch: pytest.MonkeyPatch, gradient: GradientForm) -> None:
    """Have composed projections form their gradients in this way."""
    original = choose
    monkeypatch.setattr(
        "relora_ds.methods.adapter.choose",
        lambda size, asked, room, rates: original(size, asked, room, rates, gradient),
    )


@pytest.mark.parametrize("form", ["layer", "step"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("settings", [{}, {"trainable_scaling": True}], ids=str)
def test_a_composed_product_equals_plain_autograd(
    spec: Spec,
    form: Formulation,
    gradient: GradientForm,
    recomputed: bool,
    dtype: torch.dtype,
    tolerance: float,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forced(monkeypatch, gradient)
    layer = adapter(spec(bias=True), dtype, **settings)
    layer.recomputed = recomputed
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(2, 4, 12, generator=generator).to(dtype) for _ in range(3)]
    slopes = [torch.randn(2, 4, 20, generator=generator).to(dtype) for _ in range(3)]
    inputs = [x.requires_grad_() for x in batches]
    with weights_stay([layer], UpdateSize(8, 3, dtype, form)):
        for x, slope in zip(inputs, slopes, strict=True):
            out = checkpoint(layer, x, use_reentrant=False) if recomputed else layer(x)
            cast(torch.Tensor, out).backward(slope)
    assert layer.held() == ()

    exact = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    scale = torch.tanh(exact["scaling"]) if settings else layer.scale
    weight = exact["weight"] + scale * (exact["lora_B"] @ exact["lora_A"])
    for x, slope in zip(exact_inputs, slopes, strict=True):
        F.linear(x, weight, exact["bias"]).backward(slope.double(), retain_graph=True)

    def close(
        found: torch.Tensor | None, expected: torch.Tensor | None, slack: float = 1.0
    ) -> bool:
        assert found is not None
        assert expected is not None
        error = (found.double() - expected).norm() / expected.norm()
        return float(error) < slack * tolerance

    assert all(close(x.grad, y.grad) for x, y in zip(inputs, exact_inputs, strict=True))
    assert layer.weight.grad is None
    for name, parameter in layer.named_parameters():
        if name != "weight":
            # a single number: it is a sum of rounded terms that cancel
            assert close(parameter.grad, exact[name].grad, 20.0 if name == "scaling" else 1.0), name


@pytest.mark.parametrize(("form", "gradient"), WAYS)
def test_operations_are_those_that_torch_counts(
    spec: Spec, form: Form, gradient: GradientForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced(monkeypatch, gradient)
    layer, micro_batches = adapter(spec(40, 24)), 3
    update = UpdateSize(16, micro_batches, torch.float64, form)
    x = torch.randn(16, 24, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter, weights_stay([layer], update):
        for _ in range(micro_batches):
            layer(x).sum().backward()
    expected = micro_batches * operations(product_size(layer, update), Choice(form, gradient))
    # torch does not count products that are added in place
    in_place = micro_batches * 2 * 16 * RANK * (40 + 24) if form == "split" else 0
    assert counter.get_total_flops() + in_place == expected


@pytest.mark.parametrize("size", [(64, 64, 4), (64, 64, 16), (512, 1376, 128), (2048, 5461, 128)])
@pytest.mark.parametrize("tokens", [16, 256, 4096])
@pytest.mark.parametrize("micro_batches", [1, 8])
@pytest.mark.parametrize("rates", [ONLY_OPERATIONS, HOST, rates_of("cuda", torch.bfloat16)])
def test_the_cheapest_is_taken(
    size: tuple[int, int, int], tokens: int, micro_batches: int, rates: Rates
) -> None:
    work = ProductSize(tokens, micro_batches, *size)
    ways = [Choice(*way) for way in WAYS]
    found = choose(work, "auto", True, rates)
    assert seconds(work, found, rates) == min(seconds(work, way, rates) for way in ways)
    kept = [way for way in ways if way.form != "step"]
    found = choose(work, "auto", False, rates)
    assert seconds(work, found, rates) == min(seconds(work, way, rates) for way in kept)


def test_the_published_inequalities_hold() -> None:
    def taken(tokens: int, micro_batches: int, m: int, n: int, r: int) -> Choice:
        return choose(ProductSize(tokens, micro_batches, m, n, r), "auto", True, ONLY_OPERATIONS)

    # composing costs 2 m n r, the split form 2 T r (m + 2 n) per micro-batch
    assert taken(100, 1, 512, 512, 32).form == "split"
    assert taken(200, 1, 512, 512, 32).form == "step"
    assert taken(100, 2, 512, 512, 32).form == "step"
    # 4 T r (m + n) against 2 T m n + 4 m n r
    assert taken(4096, 1, 512, 512, 64).gradient == "low_rank"
    assert taken(4096, 1, 512, 512, 300).gradient == "dense"


def test_a_form_by_name_is_taken_and_room_is_asked_for() -> None:
    work = ProductSize(2048, 1, 512, 512, 32)
    assert choose(work, "auto", True, HOST).form == "step"
    assert choose(work, "auto", False, HOST).form == "layer"
    for form in FORMS:
        assert choose(work, form, False, HOST).form == form
    sparse = replace(work, count=512 * 512 // 20)
    assert choose(sparse, "split", True, HOST).form == "layer"
    assert choose(sparse, "auto", True, rates_of("cpu", torch.bfloat16)).gradient == "dense"


def test_the_gradient_of_a_sparse_part_follows_the_shape() -> None:
    # measured on one CPU core in fp32, T = 2048: 47 against 42 ms, 12 against 22 ms, 35 against 43
    for (m, n, r), form in (
        ((1024, 1024, 64), "low_rank"),
        ((512, 512, 128), "dense"),
        ((1376, 512, 128), "dense"),
    ):
        work = ProductSize(2048, 1, m, n, r, count=int(0.03 * m * n))
        assert choose(work, "layer", True, HOST).gradient == form


def test_factors_are_joined_where_that_moves_less() -> None:
    """(T, r) activations against factors of (r, n), of which each call costs something too."""
    work = ProductSize(8192, 4, 1024, 2048, 256, 2, shards=2, joined=256 * 2048)
    gpu = rates_of("cuda", torch.bfloat16)
    assert choose(work, "auto", True, gpu).form == "step"
    assert choose(replace(work, tokens=64), "auto", True, gpu).form == "split"
    late = replace(gpu, latency=1.0)
    assert choose(work, "auto", True, late).form == "split"


def test_a_rehearsal_without_memory_has_no_sampled_product() -> None:
    sparse = ProductSize(2048, 1, 1024, 1024, 64, count=int(0.001 * 1024**2))
    assert choose(sparse, "layer", True, HOST).gradient == "low_rank"
    assert choose(sparse, "layer", True, rates_of("meta", torch.float32)).gradient == "dense"


def test_room_is_an_eighth_of_the_device_below_stage_3(spec: Spec) -> None:
    train = TrainConfig(
        steps=1, seq_length=8, micro_batch_size=2, global_batch_size=16, precision="fp32"
    )
    layers: list[Projection] = [adapter(spec()), adapter(spec(12, 20))]
    composed = 4 * 2 * 20 * 12
    for stage, memory, room in (
        (2, None, True),
        (2, 8 * composed, True),
        (2, 8 * composed - 1, False),
        (3, None, False),
    ):
        update = update_of(layers, train, stage, 2, "cpu", memory)
        assert update == UpdateSize(16, 4, torch.float32, "auto", "cpu", room)


def test_weights_are_composed_anew_for_every_update(spec: Spec) -> None:
    layer, x = adapter(spec()), torch.ones(1, 12, dtype=torch.float64)
    update = UpdateSize(1, 1, torch.float64, "step")
    with torch.no_grad():
        with weights_stay([layer], update):
            before = layer(x)
        layer.lora_B.add_(1.0)
        with weights_stay([layer], update):
            after = layer(x)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, layer(x))  # outside an update nothing is kept
    assert layer.held() == ()
