"""The inverse square root of a Gram matrix against eigenvalues and singular values."""

from __future__ import annotations

import pytest
import torch

from relora_ds.optim.matrix_wise.inverse_root import SMALLEST, inverse_by_products, inverse_root


def lifted(singular: torch.Tensor) -> torch.Tensor:
    """What becomes of singular values (count,), none above 1."""
    rough, root = inverse_root(singular.square()[:, None, None])
    return singular * (rough * root).flatten()


def orthogonal(size: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64)).Q


def test_all_singular_values_that_are_not_small_become_one() -> None:
    values = torch.logspace(-4, 0, 2000, dtype=torch.float64)
    assert values[0] >= SMALLEST * (1 - 1e-9)
    assert (lifted(values) - 1).abs().max() <= 1e-6


def test_smaller_ones_stay_in_order_and_below_one() -> None:
    values = SMALLEST * torch.linspace(0, 1, 500, dtype=torch.float64)
    found = lifted(values)
    assert found[0] == 0
    assert (found.diff() >= -1e-6).all()
    assert found.max() <= 1 + 1e-6


@pytest.mark.parametrize("size", [1, 2, 24, 65])
def test_a_product_with_it_is_a_polar_factor(size: int) -> None:
    left, right = orthogonal(size, 1), orthogonal(size, 2)
    values = torch.logspace(-3.9, 0, size, dtype=torch.float64)
    matrix = (left * values) @ right.T
    rough, root = inverse_root((matrix.T @ matrix)[None])
    assert (matrix @ rough[0] @ root[0].double() - left @ right.T).abs().max() <= 1e-6


def test_a_matrix_of_zeros_has_finite_numbers() -> None:
    for factor in inverse_root(torch.zeros(2, 5, 5, dtype=torch.float64)):
        assert factor.isfinite().all()


def test_one_of_a_batch_does_not_depend_on_the_others() -> None:
    basis = orthogonal(8, 3)
    values = torch.logspace(-6, 0, 8, dtype=torch.float64)
    grams = torch.stack([(basis * values**power) @ basis.T for power in (1, 2, 3)])
    together = inverse_root(grams)
    for number in range(3):
        alone = inverse_root(grams[number : number + 1])
        for found, expected in zip(together, alone, strict=True):
            assert torch.allclose(found[number], expected[0], rtol=1e-6)


def test_an_inverse_by_products_is_the_inverse() -> None:
    basis = orthogonal(16, 4)
    spread = (basis * torch.logspace(-6, 0, 16).double()) @ basis.T
    matrices = torch.stack([spread, torch.eye(16).double()])
    lower = torch.linalg.cholesky(matrices)
    found, expected = inverse_by_products(lower), torch.cholesky_inverse(lower)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-8)
