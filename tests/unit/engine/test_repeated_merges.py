"""A thousand merges into a bf16 weight, with and without the residual."""

from __future__ import annotations

import pytest
import torch

from relora_ds.numerics.base_weight import KINDS, Precision, add_product
from relora_ds.parallel.shape import slice_of

EVENTS, ROWS, COLS, RANK = 1000, 48, 40, 4


def drift(kind: Precision) -> float:
    """Relative error of the authoritative weight against float64."""
    generator = torch.Generator().manual_seed(3)
    exact = torch.randn(ROWS, COLS, generator=generator)
    working = torch.empty(ROWS * COLS, dtype=torch.bfloat16)
    base = KINDS[kind](working, exact.view(-1))
    truth = base.load(working, 0).double()
    for _ in range(EVENTS):
        left = torch.randn(ROWS, RANK, generator=generator)
        right = torch.randn(RANK, COLS, generator=generator)
        add_product(base, working, 0, left, right, 1e-2)
        truth += 1e-2 * (left.double() @ right.double()).view(-1)
    return float((base.load(working, 0) - truth).norm() / truth.norm())


@pytest.mark.slow
def test_the_residual_keeps_a_thousand_merges_exact() -> None:
    assert drift("bf16_residual") < 1e-5
    assert drift("fp32") < 1e-5
    assert drift("working") > 1e-2


def test_slices_are_edited_to_the_bits_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(4)
    exact = torch.randn(ROWS, COLS, generator=generator)
    left = torch.randn(ROWS, RANK, generator=generator)
    right = torch.randn(RANK, COLS, generator=generator)
    whole = torch.empty(ROWS * COLS, dtype=torch.bfloat16)
    base = KINDS["bf16_residual"](whole, exact.view(-1))
    edited, *_ = add_product(base, whole, 0, left, right, 0.3).tolist()
    for size in (2, 3, 7):
        elements = 0
        for rank in range(size):
            start, length = slice_of(ROWS * COLS, rank, size)
            part = torch.empty(length, dtype=torch.bfloat16)
            store = KINDS["bf16_residual"](part, exact.view(-1)[start : start + length])
            elements += int(add_product(store, part, start, left, right, 0.3)[0])
            assert torch.equal(part, whole[start : start + length])
            expected = base.load(whole, 0)[start : start + length]
            assert torch.equal(store.load(part, 0), expected)
        assert elements == edited
