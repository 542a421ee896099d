"""Factorised projections: where they start, what they compute, what is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from relora_ds.config.methods.low_rank import LowRankConfig
from relora_ds.methods.low_rank import (
    FactorLinear,
    LowRank,
    draw_frame,
    expected_singular_values,
    split_spectrum,
)
from relora_ds.parallel.linear import LinearSpec
from relora_ds.randomness import Stream

Spec = Callable[..., LinearSpec]


def initialised(spec: LinearSpec, dense: torch.Tensor, **settings: Any) -> FactorLinear:
    method = LowRank(LowRankConfig.model_validate({"name": "low_rank", **settings}), 42, 100)
    layer = method.linear(spec)
    assert isinstance(layer, FactorLinear)
    with torch.no_grad():
        method.initialize(layer, dense)
        assert torch.equal(method.dense_weight(layer), layer.lora_B @ layer.lora_A)
    return layer


@pytest.mark.parametrize(("rows", "cols"), [(20, 12), (12, 20), (16, 16)])
def test_spectral_is_the_best_approximation(spec: Spec, rows: int, cols: int) -> None:
    dense = torch.randn(rows, cols, generator=torch.Generator().manual_seed(1))
    layer = initialised(spec(rows, cols), dense, rank=5)
    values = torch.linalg.svdvals(dense.double())
    product = layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    # Eckart and Young: no rank-5 matrix is closer than the root of the cut values' squares
    best = values[5:].square().sum().sqrt()
    assert float((dense - product).norm() / best) == pytest.approx(1.0, abs=1e-5)
    for factor in (layer.lora_B.detach().t(), layer.lora_A.detach()):
        # split evenly: both factors carry the root of the singular values
        error = (factor @ factor.t() - values[:5].float().diag()).abs().max()
        # the rounding of sums of products as large as the largest value
        assert float(error / values[0]) < 16 * torch.finfo(torch.float32).eps


def test_spectral_signs_are_fixed(spec: Spec) -> None:
    dense = torch.randn(20, 12, generator=torch.Generator().manual_seed(2))
    layer, negated = (initialised(spec(), d, rank=6) for d in (dense, -dense))
    for column in layer.lora_B.detach().t():
        assert column[column.abs().argmax()] > 0
    # the left vectors of -W are those of W: only the right ones carry the sign
    torch.testing.assert_close(negated.lora_B, layer.lora_B, atol=1e-5, rtol=0)
    torch.testing.assert_close(negated.lora_A, -layer.lora_A, atol=1e-5, rtol=0)


LARGE = 800, 900  # rows, columns: more than are decomposed


def started(spec: LinearSpec, draw: Callable[[], torch.Tensor], **settings: Any) -> FactorLinear:
    method = LowRank(LowRankConfig.model_validate({"name": "low_rank", **settings}), 42, 100)
    layer = method.linear(spec)
    assert isinstance(layer, FactorLinear)
    with torch.no_grad():
        method.initialize_at_random(layer, draw, 0.02)
    return layer


def unused() -> torch.Tensor:
    raise AssertionError("the dense weight is not needed")


def test_a_large_random_start_is_distributed_as_the_best_approximation(spec: Spec) -> None:
    rank = 60
    layer = started(spec(*LARGE), unused, rank=rank)
    dense = 0.02 * torch.randn(*LARGE, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(dense)[:rank]
    for factor in (layer.lora_B.detach().t(), layer.lora_A.detach()):
        gram = factor @ factor.t()
        torch.testing.assert_close(gram.diag(), values, rtol=0.012, atol=0.0)
        assert float((gram - gram.diag().diag()).abs().max() / values[0]) < 1e-6
        # directions are uniform: entries of unit vectors are nearly normal, of mean 0
        unit = factor / factor.norm(dim=1, keepdim=True) * factor.shape[1] ** 0.5
        assert float(unit.mean(1).abs().max()) < 5.0 / factor.shape[1] ** 0.5
        assert float(unit.pow(4).mean()) == pytest.approx(3.0, rel=0.03)
    # and the two sides know nothing of each other
    sides = layer.lora_B.detach().t()[:, :800] * layer.lora_A.detach()[:, :800]
    assert float(sides.mean().abs() / sides.std()) < 4.0 / (rank * 800) ** 0.5
    assert bool((layer.lora_B.gather(0, layer.lora_B.abs().argmax(0, keepdim=True)) > 0).all())


def test_a_large_random_start_is_a_function_of_seed_and_name(spec: Spec) -> None:
    first, again = (started(spec(*LARGE), unused, rank=8) for _ in range(2))
    other = started(spec(*LARGE, name="a.k"), unused, rank=8)
    assert torch.equal(first.lora_A, again.lora_A)
    assert torch.equal(first.lora_B, again.lora_B)
    assert not torch.equal(first.lora_A, other.lora_A)


@pytest.mark.parametrize(
    ("rows", "cols", "init"), [(768, 900, "spectral"), (900, 20, "spectral"), (*LARGE, "svd")]
)
def test_other_random_starts_approximate_the_draw(
    spec: Spec, rows: int, cols: int, init: str
) -> None:
    dense = torch.zeros(rows, cols)
    dense[3, 5] = 2.0
    layer = started(spec(rows, cols), lambda: dense, rank=2, init=init)
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, dense, atol=1e-5, rtol=0)


def test_given_weights_are_approximated_whatever_their_size(spec: Spec) -> None:
    dense = torch.zeros(*LARGE)
    dense[3, 5] = 2.0
    layer = initialised(spec(*LARGE), dense, rank=2)
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("rows", "cols"), [(300, 300), (300, 700), (700, 300)])
def test_expected_singular_values(rows: int, cols: int) -> None:
    dense = torch.randn(rows, cols, generator=torch.Generator().manual_seed(4))
    found = torch.linalg.svdvals(dense)[:200]
    expected = torch.from_numpy(expected_singular_values(rows, cols, 200)).float()
    torch.testing.assert_close(expected, found, rtol=0.02, atol=0.0)
    every = expected_singular_values(rows, cols, 300)
    # their squares add up to the squares of the entries
    assert (every**2).sum() == pytest.approx(rows * cols, rel=1e-4)


@pytest.mark.parametrize("count", [1, 30, 99])
def test_frames_are_orthonormal(count: int) -> None:
    frame = draw_frame(Stream(1, "left", "a.k"), 100, count, torch.device("cpu"))
    torch.testing.assert_close(
        frame.t() @ frame, torch.eye(count, dtype=torch.float64), atol=1e-8, rtol=0
    )


def test_xavier(spec: Spec) -> None:
    rows, cols, rank = 300, 200, 50
    dense = torch.zeros(rows, cols)
    layer = initialised(spec(rows, cols), dense, rank=rank, init="xavier")
    lora_a, lora_b = layer.lora_A.detach(), layer.lora_B.detach()
    assert float(lora_a.std()) == pytest.approx((2 / (rank + cols)) ** 0.5, rel=0.03)
    assert float(lora_b.std()) == pytest.approx((2 / (rank + rows)) ** 0.5, rel=0.03)
    assert abs(float(lora_a.mean())) < 5e-3
    other = initialised(spec(rows, cols, name="a.k"), dense, rank=rank, init="xavier")
    assert not torch.equal(other.lora_A, layer.lora_A)


@pytest.mark.parametrize("bias", [False, True])
def test_computes_its_product(spec: Spec, bias: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    layer = initialised(spec(bias=bias), torch.randn(20, 12, generator=generator), rank=3)
    if layer.bias is not None:
        layer.bias.data = torch.randn(20, generator=generator)
    x = torch.randn(2, 4, 12, generator=generator)
    expected = x @ (layer.lora_B @ layer.lora_A).t() + (0.0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(layer(x), expected)
    names = {"lora_A", "lora_B"} | ({"bias"} if bias else set())
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == names


@pytest.mark.parametrize(("rows", "cols"), [(20, 12), (12, 20)])
def test_a_matrix_of_lower_rank_is_met_exactly(rows: int, cols: int) -> None:
    generator = torch.Generator().manual_seed(2)
    dense = torch.randn(rows, 2, generator=generator) @ torch.randn(2, cols, generator=generator)
    left, right = split_spectrum(dense, 5)
    torch.testing.assert_close(left @ right, dense, rtol=1e-5, atol=1e-5)
    left, right = split_spectrum(torch.zeros(rows, cols), 5)
    assert not left.any()
    assert not right.any()
