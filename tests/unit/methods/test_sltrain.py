"""The sparse plus low-rank projection: what it computes, saves, composes and trains."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from relora_ds.config.methods.sltrain import SLTrainConfig
from relora_ds.methods.sltrain import sparse_linear
from relora_ds.methods.sltrain.sltrain import SLTrain, SparseLowRankLinear
from relora_ds.methods.sltrain.support import flat_positions
from relora_ds.parallel.footprint import UpdateSize
from relora_ds.parallel.linear import LinearSpec, weights_stay

Spec = Callable[..., LinearSpec]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}


def build(spec: LinearSpec, **settings: Any) -> SparseLowRankLinear:
    """An initialised projection with a B that is not zero, as after some training."""
    values = {"name": "sltrain", "rank": 4, "alpha": 8, "sparsity": 0.2, **settings}
    method = SLTrain(SLTrainConfig.model_validate(values), seed=42, steps=100)
    layer = method.linear(spec)
    assert isinstance(layer, SparseLowRankLinear)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        method.initialize(layer, torch.empty(spec.out_features, spec.in_features))
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.3)
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
    return layer


def dense(layer: SparseLowRankLinear, trained: dict[str, torch.Tensor]) -> torch.Tensor:
    """scale * B @ A + S by ordinary autograd."""
    product = layer.scale * trained["lora_B"] @ trained["lora_A"]
    positions = flat_positions(layer.row_starts, layer.columns, product.shape[1]).long()
    return (product.view(-1).index_add(0, positions, trained["values"])).view_as(product)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gradient", ["dense", "low_rank"])
@pytest.mark.parametrize("keep_composed", ["layer", "step"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(40, 24), (24, 40)])
def test_forward_and_gradients_equal_dense_autograd(
    spec: Spec, rows: int, cols: int, bias: bool, keep_composed: str, gradient: str, dtype: Any
) -> None:
    layer = build(spec(rows, cols, bias=bias), gradient=gradient, keep_composed=keep_composed)
    layer.to(dtype)
    assert layer.columns.dtype == torch.int16
    generator = torch.Generator().manual_seed(2)
    x, slope = (torch.randn(3, 5, w, generator=generator).to(dtype) for w in (cols, rows))
    x.requires_grad_()
    exact = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    expected = exact_x @ dense(layer, exact).t() + (exact["bias"] if bias else 0.0)
    with weights_stay([layer], UpdateSize(15, 1, dtype)):
        out = layer(x)
        assert len(layer.held()) == (keep_composed == "step")
        assert out.dtype == dtype
        assert relative(out, expected) <= TOLERANCE[dtype]
        (out * slope).sum().backward()
    (expected * slope.double()).sum().backward()
    assert x.grad is not None
    assert exact_x.grad is not None
    assert relative(x.grad, exact_x.grad) <= TOLERANCE[dtype]
    for name, parameter in layer.named_parameters():
        expected_grad = exact[name].grad
        assert parameter.grad is not None
        assert expected_grad is not None
        assert relative(parameter.grad, expected_grad) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("gradient", ["dense", "low_rank"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_gradcheck(spec: Spec, gradient: str, recomputed: bool) -> None:
    layer = build(spec(7, 5), rank=2, gradient=gradient).double()
    layer.recomputed = recomputed
    parameters = [layer.lora_A, layer.lora_B, layer.values]

    def product(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return layer(x)

    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(product, (x, *parameters), atol=1e-6)


@pytest.mark.parametrize("frozen", ["x", "lora_A", "lora_B", "values", "trained"])
def test_only_what_is_asked_for_gets_a_gradient(spec: Spec, frozen: str) -> None:
    layer = build(spec())
    x = torch.randn(4, 12, requires_grad=frozen != "x")
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(frozen not in (name, "trained"))
    layer(x).sum().backward()
    assert (x.grad is None) == (frozen == "x")
    for parameter in layer.parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad)


def test_start(spec: Spec) -> None:
    method = SLTrain(SLTrainConfig(name="sltrain", rank=8, sparsity=0.1), seed=3, steps=1)
    layer = method.linear(spec(80, 60))
    assert isinstance(layer, SparseLowRankLinear)
    with torch.no_grad():
        method.initialize(layer, torch.randn(80, 60))
    bound = 60**-0.5
    assert bool((layer.lora_B == 0).all())
    for drawn in (layer.lora_A, layer.values):
        assert float(drawn.detach().abs().max()) <= bound
        assert float(drawn.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    weight = method.dense_weight(layer)
    assert int(weight.count_nonzero()) == 480 == layer.values.numel()
    again = method.linear(spec(80, 60))
    assert isinstance(again, SparseLowRankLinear)
    with torch.no_grad():
        method.initialize(again, torch.zeros(80, 60))
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in layer.state_dict().items()
    )


def test_off_the_support_the_weight_is_the_product(spec: Spec) -> None:
    layer = build(spec(40, 24))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for _ in range(5):
        layer(torch.randn(8, 24)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    method = SLTrain(SLTrainConfig(name="sltrain"), 42, 1)
    rest = method.dense_weight(layer) - layer.scale * layer.lora_B @ layer.lora_A
    positions = flat_positions(layer.row_starts, layer.columns, 24).long()
    rest = rest.detach().view(-1).index_fill(0, positions, 0.0)
    assert float(rest.abs().max()) <= 1e-7
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


def test_the_support_is_derived_again_where_only_parameters_are_known(spec: Spec) -> None:
    method = SLTrain(SLTrainConfig(name="sltrain", rank=4, sparsity=0.2), 42, 1)
    layer = method.linear(spec())
    with torch.no_grad():
        method.initialize(layer, torch.zeros(20, 12))
    with torch.device("meta"):
        bare = method.linear(spec())
    bare.load_state_dict(dict(layer.named_parameters()), strict=False, assign=True)
    assert torch.equal(method.dense_weight(bare), method.dense_weight(layer))


class Storages(TorchDispatchMode):
    """Weak references to the memory of every tensor of at least `limit` bytes that is made."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.made: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.nbytes() >= self.limit:
                    self.made.append(StorageWeakRef(storage))
        return out

    def alive(self) -> int:
        """How many of them somebody still holds."""
        gc.collect()
        return sum(not storage.expired() for storage in self.made)


@pytest.mark.parametrize("gradient", ["dense", "low_rank"])
def test_no_dense_tensor_survives(spec: Spec, gradient: str) -> None:
    rows, cols = 96, 64
    layer = build(spec(rows, cols), rank=4, sparsity=0.05, gradient=gradient)
    x = torch.randn(8, cols, requires_grad=True)
    with Storages(limit=4 * rows * cols) as forward:
        out = layer(x)
    assert forward.made, "the composed weight was meant to be seen"
    assert forward.alive() == 0
    with Storages(limit=4 * rows * cols) as backward:
        out.sum().backward()
    assert backward.made
    assert backward.alive() == 0


def test_a_kept_weight_would_be_seen(spec: Spec) -> None:
    layer = build(spec(96, 64), keep_composed="step")
    with weights_stay([layer], UpdateSize(8)):
        with Storages(limit=4 * 96 * 64) as forward:
            layer(torch.randn(8, 64))
        assert forward.alive() > 0
    assert forward.alive() == 0


def test_saved_bytes(spec: Spec) -> None:
    rows, cols, rank, tokens = 96, 64, 4, 8
    layer = build(spec(rows, cols), rank=rank, sparsity=0.05).to(torch.bfloat16)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(tokens, cols).to(torch.bfloat16))
    nnz = layer.values.numel()
    factors = 2 * rank * (rows + cols)
    assert sum(saved.values()) == 2 * tokens * cols + factors + nnz * (2 + 2) + 4 * (rows + 1)


@pytest.fixture
def compositions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per composed weight."""
    made: list[int] = []
    original = sparse_linear.compose

    def counted(*args: Any, **settings: Any) -> torch.Tensor:
        made.append(1)
        return original(*args, **settings)

    monkeypatch.setattr(sparse_linear, "compose", counted)
    return made


def test_composed_once_per_product_or_once_per_step(spec: Spec, compositions: list[int]) -> None:
    layer = build(spec())
    layer(torch.randn(3, 12, requires_grad=True)).sum().backward()
    assert len(compositions) == 2
    compositions.clear()
    layer = build(spec(), keep_composed="step")
    with weights_stay([layer], UpdateSize(3, 4)):
        for _ in range(4):
            layer(torch.randn(3, 12, requires_grad=True)).sum().backward()
        assert len(compositions) == 1
        before = layer(torch.ones(1, 12))
    with torch.no_grad():
        layer.values.add_(1.0)
    with weights_stay([layer], UpdateSize(1)):
        assert not torch.equal(layer(torch.ones(1, 12)), before)
    assert len(compositions) == 2


def test_checkpointing_composes_once_in_the_backward_pass(
    spec: Spec, compositions: list[int]
) -> None:
    layer, follower = build(spec(12, 12)), build(spec(12, 12))
    layer.recomputed = follower.recomputed = True
    x = torch.randn(3, 12, requires_grad=True)
    plain = follower(layer(x)).sum()
    plain.backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    compositions.clear()
    out = checkpoint(lambda y: follower(layer(y)), x, use_reentrant=False)
    assert isinstance(out, torch.Tensor)
    assert len(compositions) == 2
    out.sum().backward()
    assert len(compositions) == 4
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected[name])


def test_weight_decay_reaches_the_values(spec: Spec) -> None:
    model = nn.ModuleDict({"projection": build(spec(bias=True)), "other": nn.LayerNorm(4)})
    method = SLTrain(SLTrainConfig(name="sltrain"), 42, 1)
    groups = {(g.role, g.decays): len(g.parameters) for g in method.parameter_groups(model)}
    assert groups == {("adapter", True): 3, ("adapter", False): 1, ("dense", False): 2}
