"""The adapted projection: its mathematics against plain autograd, and how it starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.config.methods.lora import LoRAConfig
from relora_ds.methods.adapter import AdapterLinear, draw_factors
from relora_ds.methods.lora import LoRA
from relora_ds.parallel.linear import LinearSpec

Spec = Callable[..., LinearSpec]
RANK = 5


def config_of(**settings: Any) -> LoRAConfig:
    return LoRAConfig.model_validate({"name": "lora", "rank": RANK, "alpha": 8, **settings})


def random_layer(spec: LinearSpec, dtype: torch.dtype, **settings: Any) -> AdapterLinear:
    """A layer whose every parameter, B and the bias too, is non-zero."""
    layer = AdapterLinear(spec, config_of(**settings))
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = (0.5 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return layer


def plain_forward(
    layer: AdapterLinear, p: dict[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """The definition, on float64 copies `p` of the layer's parameters."""
    scale = torch.tanh(p["scaling"]) if "scaling" in p else layer.scale
    return F.linear(x, p["weight"] + scale * (p["lora_B"] @ p["lora_A"]), p.get("bias"))


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.detach()
    return float((value.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)],
)
@pytest.mark.parametrize("shape", [(7,), (3, 4)])
@pytest.mark.parametrize("trainable_scaling", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradients_equal_plain_autograd(
    spec: Spec,
    dtype: torch.dtype,
    tolerance: float,
    shape: tuple[int, ...],
    trainable_scaling: bool,
    bias: bool,
) -> None:
    layer = random_layer(spec(bias=bias), dtype, trainable_scaling=trainable_scaling)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*shape, 12, generator=generator).to(dtype).requires_grad_()
    seed = torch.randn(*shape, 20, generator=generator).to(dtype)
    out = layer(x)
    out.backward(seed)

    p = {n: q.detach().double().requires_grad_() for n, q in layer.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    expected = plain_forward(layer, p, x64)
    expected.backward(seed.double())

    assert out.dtype == dtype
    assert relative(out, expected) < tolerance
    assert x.grad is not None
    assert x64.grad is not None
    assert relative(x.grad, x64.grad) < tolerance
    assert layer.weight.grad is None
    for name, parameter in layer.named_parameters():
        if name != "weight":
            grad, reference = parameter.grad, p[name].grad
            assert grad is not None
            assert reference is not None
            # a single number: it is a sum of rounded terms that cancel
            slack = 20.0 if name == "scaling" else 1.0
            assert relative(grad, reference) < tolerance * slack, name


def test_numerical_gradients(spec: Spec) -> None:
    layer = random_layer(spec(6, 5), torch.float64, trainable_scaling=True, rank=2)
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(),), eps=1e-6, atol=1e-6)


def test_an_input_without_gradient_and_strided_tensors(spec: Spec) -> None:
    layer = random_layer(spec(), torch.float64)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(12, 6, dtype=torch.float64, generator=generator).t()
    assert not x.is_contiguous()
    out = layer(x)
    seed = torch.randn(20, 6, dtype=torch.float64, generator=generator).t()
    out.backward(seed)
    scale, grad = layer.scale, layer.lora_A.grad
    assert grad is not None
    expected = scale * layer.lora_B.detach().t() @ seed.t() @ x
    assert relative(grad, expected) < 1e-13


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_gets_no_gradient(spec: Spec, frozen: str) -> None:
    layer = random_layer(spec(), torch.float32)
    getattr(layer, frozen).requires_grad_(False)
    layer(torch.ones(2, 12)).sum().backward()
    gradients = {n for n, p in layer.named_parameters() if p.grad is not None}
    assert gradients == {"lora_A", "lora_B"} - {frozen}


@pytest.mark.parametrize("trainable_scaling", [False, True])
def test_nothing_is_saved_but_the_input_and_the_parameters(
    spec: Spec, trainable_scaling: bool
) -> None:
    layer = random_layer(spec(), torch.float32, trainable_scaling=trainable_scaling)
    x = torch.randn(3, 40, 12, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    known = {x.data_ptr()} | {p.data_ptr() for p in layer.parameters()}
    extra = sum(size for pointer, size in saved.items() if pointer not in known)
    # with a trained scale: scale * B and tanh(scale)
    assert extra == (4 * (20 * RANK + 1) if trainable_scaling else 0)
    assert x.data_ptr() in saved


@pytest.mark.parametrize("init", ["kaiming", "balanced"])
@pytest.mark.parametrize("trainable_scaling", [False, True])
def test_starts_as_the_dense_projection(spec: Spec, init: Any, trainable_scaling: bool) -> None:
    method = LoRA(config_of(init=init, trainable_scaling=trainable_scaling), 42, 100)
    layer = method.linear(spec(48, 64, bias=True))
    assert isinstance(layer, AdapterLinear)
    dense = torch.randn(48, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        method.initialize(layer, dense)
        assert layer.bias is not None
        layer.bias.fill_(0.5)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(6))
    # kaiming adds an exact zero
    tolerance = 0.0 if init == "kaiming" else 1e-5
    assert relative(layer(x), F.linear(x, dense, layer.bias).double()) <= tolerance
    with torch.no_grad():
        assert relative(method.dense_weight(layer), dense.double()) <= tolerance
    assert layer.lora_A.all()
    assert (layer.scaling is not None) is trainable_scaling
    assert layer.merge_scale() == pytest.approx(math.tanh(1.0) if trainable_scaling else 8 / RANK)
    assert bool((layer.lora_B == 0).all()) is (init == "kaiming")


def test_kaiming_fills_its_range(spec: Spec) -> None:
    rows, cols = 30, 400
    layer = AdapterLinear(spec(rows, cols), config_of(rank=64))
    lora_a, lora_b = draw_factors(layer, config_of(rank=64), seed=1, event=0)
    bound = 1.0 / math.sqrt(cols)
    assert lora_a.shape == (64, cols)
    assert lora_b.shape == (rows, 64)
    assert not lora_b.any()
    assert float(lora_a.abs().max()) <= bound
    assert float(lora_a.min()) < -0.999 * bound
    assert float(lora_a.max()) > 0.999 * bound
    assert float(lora_a.std()) == pytest.approx(bound / math.sqrt(3.0), rel=0.01)


@pytest.mark.parametrize(
    ("rows", "cols", "rank"), [(512, 512, 128), (300, 800, 64), (900, 256, 64)]
)
def test_balanced_keeps_a_third_of_the_variance(
    spec: Spec, rows: int, cols: int, rank: int
) -> None:
    config = LoRAConfig(name="lora", rank=rank, init="balanced")
    assert config.scale == 1.0 / rank
    layer = AdapterLinear(spec(rows, cols), config)
    lora_a, lora_b = draw_factors(layer, config, seed=1, event=0)
    gain = 1.0 / math.sqrt(3.0)
    std_a = (math.sqrt(rows) * rank / cols**1.5) ** 0.25 * math.sqrt(gain)
    std_b = (rank / math.sqrt(rows * cols)) ** 0.25 * math.sqrt(gain)
    for factor, std in ((lora_a, std_a), (lora_b, std_b)):
        assert float(factor.std()) == pytest.approx(std, rel=0.02)
        assert float(factor.abs().max()) <= math.sqrt(3.0) * std * (1 + 1e-6)
    x = torch.randn(cols, 200, generator=torch.Generator().manual_seed(7))
    out = lora_b @ (lora_a @ x) / rank
    assert float(out.var() / x.var()) == pytest.approx(1 / 3, rel=0.05)


def test_balanced_check_value(spec: Spec) -> None:
    """m = n = 256, r = 64: both standard deviations are 0.5373."""
    config = LoRAConfig(name="lora", rank=64, init="balanced")
    factors = draw_factors(AdapterLinear(spec(256, 256), config), config, seed=1, event=0)
    for factor in factors:
        assert float(factor.abs().max()) == pytest.approx(0.5373 * math.sqrt(3.0), rel=1e-3)


@pytest.mark.parametrize("init", ["kaiming", "balanced"])
def test_draws_differ_by_name_event_factor_and_seed(spec: Spec, init: Any) -> None:
    config = config_of(init=init)
    draws = []
    for name in ("a.q", "a.k"):
        layer = AdapterLinear(spec(16, 16, name=name), config)
        for seed in (1, 2):
            for event in (0, 1, 2):
                lora_a, lora_b = draw_factors(layer, config, seed, event)
                assert torch.equal(lora_a, draw_factors(layer, config, seed, event)[0])
                draws += [lora_a.flatten()] + ([lora_b.t().flatten()] if lora_b.any() else [])
    stacked = torch.stack(draws)
    assert torch.unique(stacked, dim=0).shape[0] == len(draws) == (12 if init == "kaiming" else 24)


def test_dense_weight_is_what_the_layer_computes(spec: Spec) -> None:
    for trainable_scaling in (False, True):
        layer = random_layer(spec(), torch.float32, trainable_scaling=trainable_scaling)
        method = LoRA(config_of(trainable_scaling=trainable_scaling), 42, 100)
        weight = method.dense_weight(layer).detach()
        assert weight.dtype == torch.float32
        assert relative(layer(torch.eye(12)), weight.t().double()) < 1e-6


def test_only_the_adapters_are_trained(spec: Spec) -> None:
    method = LoRA(config_of(trainable_scaling=True), 42, 100)
    model = nn.ModuleDict({"a": method.linear(spec(bias=True)), "norm": nn.LayerNorm(3)})
    groups = {
        (group.role, group.decays): group.parameters for group in method.parameter_groups(model)
    }
    layer = model["a"]
    assert isinstance(layer, AdapterLinear)

    def ids(*parameters: nn.Parameter | None) -> set[int]:
        return {id(parameter) for parameter in parameters}

    assert {key: ids(*group) for key, group in groups.items()} == {
        ("adapter", True): ids(layer.lora_A, layer.lora_B),
        ("adapter", False): ids(layer.bias, layer.scaling),
        ("dense", False): ids(*model["norm"].parameters()),
    }
    assert method.edited_weights(model) == []
    assert method.vector_axes(model) == {}
