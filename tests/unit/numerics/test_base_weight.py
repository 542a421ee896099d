"""How exactly an edited weight is kept, and whether the report of an edit is true."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from relora_ds.numerics import base_weight
from relora_ds.numerics.base_weight import (
    KINDS,
    FullPrecision,
    Precision,
    Residual,
    WeightEdit,
    Working,
    add_product,
)

ROWS, COLS, RANK = 24, 20, 3
EXACT: list[Precision] = ["working", "bf16_residual", "fp32"]


def make(kind: Precision, exact: torch.Tensor) -> tuple[base_weight.BaseWeight, torch.Tensor]:
    """A store and its working weight; `working` is then fp32."""
    dtype = torch.float32 if kind == "working" else torch.bfloat16
    working = torch.full((exact.numel(),), torch.nan, dtype=dtype)
    return KINDS[kind](working, exact), working


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


def bit_patterns() -> torch.Tensor:
    """fp32 words of every exponent with tricky mantissas, both signs, and random ones."""
    exponents = torch.arange(0, 255, dtype=torch.int64).unsqueeze(1) << 23
    mantissas = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x18000, 0x7FFFFF])
    words = (exponents | mantissas).flatten()
    generator = torch.Generator().manual_seed(1)
    random = torch.randint(0, 0x7F800000, (20_000,), generator=generator)
    words = torch.cat([words, random])
    words = torch.cat([words, words | (1 << 31)])
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return words.to(torch.int32).view(torch.float32)


def test_residual_restores_every_word() -> None:
    exact = bit_patterns()
    base, working = make("bf16_residual", exact)
    restored = base.load(working, 0)
    assert torch.equal(restored.view(torch.int32), exact.view(torch.int32))


def test_residual_works_with_the_nearest_bf16() -> None:
    exact = bit_patterns()
    base, working = make("bf16_residual", exact)
    assert isinstance(base, Residual)
    nearest = exact.bfloat16()
    away_from_zero = base.low == -0x8000
    assert torch.equal(working[~away_from_zero], nearest[~away_from_zero])
    # a tie: as near as the even neighbour, and never nearer to zero than the value
    ties = working[away_from_zero].double(), exact[away_from_zero].double()
    assert away_from_zero.sum() > 100
    assert bool((ties[0].abs() > ties[1].abs()).all())
    finite = away_from_zero & working.isfinite() & nearest.isfinite()
    error = (working[finite].double() - exact[finite].double()).abs()
    assert torch.equal(error, (nearest[finite].double() - exact[finite].double()).abs())


def test_residual_keeps_infinities() -> None:
    exact = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])
    base, working = make("bf16_residual", exact)
    assert working.tolist() == exact.tolist()
    assert torch.equal(base.load(working, 0).view(torch.int32), exact.view(torch.int32))


@pytest.mark.parametrize("kind", EXACT)
def test_slices_are_loaded_and_stored_in_place(kind: Precision) -> None:
    exact = normal(100)
    base, working = make(kind, exact)
    for name, tensor in base.tensors().items():
        assert tensor.numel() == 100, name
    pointer = working.data_ptr()
    base.store(working[10:30], 10, exact[10:30] * 3)
    loaded = base.load(working, 0)
    expected = exact.clone()
    expected[10:30] *= 3
    assert torch.equal(loaded, expected)
    assert torch.equal(base.load(working[5:40], 5), expected[5:40])
    assert working.data_ptr() == pointer
    loaded.zero_()
    assert torch.equal(base.load(working, 0), expected), "load returned a live view"
    if kind == "fp32":
        assert torch.equal(working, expected.bfloat16())


def test_stores_hold_what_a_checkpoint_needs() -> None:
    exact = normal(50)
    stores: dict[Precision, set[str]]
    stores = {"working": set(), "bf16_residual": {"low"}, "fp32": {"exact"}}
    for kind, names in stores.items():
        base, working = make(kind, exact)
        saved = {name: tensor.clone() for name, tensor in base.tensors().items()}
        assert saved.keys() == names
        other, _ = make(kind, torch.zeros(50))
        for name, tensor in other.tensors().items():
            tensor.copy_(saved[name])
        assert torch.equal(other.load(working, 0), exact)


@pytest.mark.parametrize("kind", base_weight.KINDS)
@pytest.mark.parametrize(("first", "step", "count"), [(0, 1, 4), (2, 3, 3), (5, 7, 1)])
def test_rows_are_loaded_as_one_slice_is(
    kind: Precision, first: int, step: int, count: int
) -> None:
    base, working = make(kind, normal(ROWS, COLS).view(-1))
    whole = base.load(working, 0).view(ROWS, COLS)
    start, end = first * COLS, (first + (count - 1) * step + 1) * COLS
    rows = base.load_rows(working[start:end], start, COLS, step)
    assert torch.equal(rows, whole[first::step][:count])
    rows.zero_()
    assert torch.equal(base.load(working, 0).view(ROWS, COLS), whole)


@pytest.mark.parametrize("kind", EXACT)
def test_add_product_is_the_product(kind: Precision) -> None:
    exact, left, right = normal(ROWS, COLS), normal(ROWS, RANK, seed=1), normal(RANK, COLS, seed=2)
    base, working = make(kind, exact.view(-1))
    edit = WeightEdit.of(add_product(base, working, 0, left, right, 0.25).tolist())
    expected = exact.double() + 0.25 * left.double() @ right.double()
    loaded = base.load(working, 0).view(ROWS, COLS)
    assert relative(loaded, expected) < 1e-7
    assert edit.elements == int((loaded != exact).sum()) == ROWS * COLS
    assert (edit.error_sq / edit.output_sq) ** 0.5 < 1e-6


def test_factors_may_be_bf16() -> None:
    exact, left, right = normal(ROWS, COLS), normal(ROWS, RANK, seed=1), normal(RANK, COLS, seed=2)
    left, right = left.bfloat16(), right.bfloat16()
    base, working = make("bf16_residual", exact.view(-1))
    add_product(base, working, 0, left, right, 0.25)
    expected = exact.double() + 0.25 * left.double() @ right.double()
    assert relative(base.load(working, 0).view(ROWS, COLS), expected) < 1e-7


def brute_force(
    old: torch.Tensor, new: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float
) -> WeightEdit:
    """The report by its definition, in float64, on the same inputs."""
    old, new, left, right = (tensor.double() for tensor in (old, new, left, right))
    delta = scale * left @ right
    inputs = base_weight._probe_inputs(old.shape[1], torch.device("cpu"))
    return WeightEdit(
        elements=int((new != old).sum()),
        error_sq=float(((new - old - delta) @ inputs).square().sum()),
        output_sq=float((new @ inputs).square().sum()),
        intended_sq=float(delta.square().sum()),
        lost_sq=float((new - old - delta).square().sum()),
    )


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1e-2, 1.0])
def test_the_report_of_a_lossy_edit_is_true(size: float) -> None:
    old = normal(ROWS, COLS).bfloat16()
    left, right = size * normal(ROWS, RANK, seed=1), normal(RANK, COLS, seed=2)
    working = old.clone().view(-1)
    edit = WeightEdit.of(
        add_product(Working(working, working.float()), working, 0, left, right, 0.5).tolist()
    )
    expected = brute_force(old, working.view(ROWS, COLS), left, right, 0.5)
    assert edit.elements == expected.elements
    for name in ("error_sq", "output_sq", "intended_sq", "lost_sq"):
        assert getattr(edit, name) == pytest.approx(getattr(expected, name), rel=1e-3), name
    assert edit.error_sq > 0.0
    assert edit.lost_sq > (0.9 if size == 1e-5 else 1e-7) * edit.intended_sq


@pytest.mark.parametrize("kind", ["bf16_residual", "fp32"])
def test_the_report_of_a_faithful_edit_is_the_rounding_of_fp32(kind: Precision) -> None:
    exact, left, right = normal(ROWS, COLS), normal(ROWS, RANK, seed=1), normal(RANK, COLS, seed=2)
    base, working = make(kind, exact.view(-1))
    edit = WeightEdit.of(add_product(base, working, 0, left, right, 0.5).tolist())
    new = base.load(working, 0).view(ROWS, COLS)
    expected = brute_force(exact, new, left, right, 0.5)
    assert edit.error_sq == pytest.approx(expected.error_sq, rel=1e-3)
    assert edit.output_sq == pytest.approx(expected.output_sq, rel=1e-9)
    assert 0.0 < edit.error_sq < 1e-13 * edit.output_sq
    assert edit.lost_sq < 1e-13 * edit.intended_sq


def test_an_edit_below_the_precision_changes_nothing_and_says_so() -> None:
    working = torch.ones(ROWS * COLS, dtype=torch.bfloat16)
    left, right = torch.full((ROWS, 1), 1e-4), torch.ones(1, COLS)
    edit = WeightEdit.of(
        add_product(Working(working, working.float()), working, 0, left, right, 1.0).tolist()
    )
    assert edit.elements == 0
    assert edit.lost_sq == pytest.approx(edit.intended_sq) == pytest.approx(ROWS * COLS * 1e-8)
    assert bool((working == 1).all())


def drift(store: type[base_weight.BaseWeight], dtype: torch.dtype, edits: int) -> float:
    """Distance from the float64 truth after many edits by a random product of rank 1."""
    exact = 0.05 * normal(32, 32)
    working = torch.empty(exact.numel(), dtype=dtype)
    base, truth = store(working, exact.view(-1)), exact.double()
    lefts, rights = normal(edits, 32, 1, seed=1), normal(edits, 1, 32, seed=2)
    for left, right in zip(lefts, rights, strict=True):
        add_product(base, working, 0, left, right, 1e-3)
        truth += 1e-3 * left.double() @ right.double()
    return relative(base.load(working, 0).view(32, 32), truth)


def test_drift_after_a_thousand_edits() -> None:
    assert drift(Residual, torch.bfloat16, 1000) < 1e-5
    assert drift(FullPrecision, torch.bfloat16, 1000) < 1e-5
    assert drift(Working, torch.bfloat16, 1000) > 1e-3


@pytest.mark.parametrize("block", [1, 2 * COLS, 7 * COLS + 3, 1 << 22])
def test_blocks_of_rows_are_no_part_of_the_result(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, left, right = normal(ROWS, COLS), normal(ROWS, RANK, seed=1), normal(RANK, COLS, seed=2)
    base, working = make("bf16_residual", exact.view(-1))
    whole = WeightEdit.of(add_product(base, working, 0, left, right, 0.5).tolist())
    monkeypatch.setitem(base_weight._BLOCKS, "cpu", block)
    other, blocked = make("bf16_residual", exact.view(-1))
    edit = WeightEdit.of(add_product(other, blocked, 0, left, right, 0.5).tolist())
    torch.testing.assert_close(other.load(blocked, 0), base.load(working, 0), rtol=2e-7, atol=2e-7)
    assert edit.elements == whole.elements
    assert edit.output_sq == pytest.approx(whole.output_sq, rel=1e-6)
    assert edit.intended_sq == pytest.approx(whole.intended_sq, rel=1e-6)


@pytest.mark.parametrize("cuts", [(240,), (241,), (1,), (479,), (100, 110), (0, 480), (13, 333)])
def test_slices_add_up_to_the_whole_edit(cuts: tuple[int, ...]) -> None:
    exact, left, right = normal(ROWS, COLS), normal(ROWS, RANK, seed=1), normal(RANK, COLS, seed=2)
    base, working = make("bf16_residual", exact.view(-1))
    whole = WeightEdit.of(add_product(base, working, 0, left, right, 0.5).tolist())
    parts, edits = [], []
    for begin, end in pairwise([0, *cuts, ROWS * COLS]):
        store, part = make("bf16_residual", exact.view(-1)[begin:end].clone())
        sums = add_product(store, part, begin, left, right, 0.5)
        edits.append(WeightEdit.of(sums.tolist()))
        parts.append(store.load(part, 0))
    assert torch.equal(torch.cat(parts), base.load(working, 0)), "the cut shows in the bits"
    assert sum(edit.elements for edit in edits) == whole.elements
    intended = sum(edit.intended_sq for edit in edits)
    assert intended == pytest.approx(whole.intended_sq, rel=1e-6)
    assert all(edit.error_sq <= 1e-12 * max(edit.output_sq, 1e-9) for edit in edits)


def test_probe_inputs_are_balanced_and_unlike_each_other() -> None:
    inputs = base_weight._probe_inputs(4096, torch.device("cpu"))
    assert set(inputs.unique().tolist()) == {-1.0, 1.0}
    gram = inputs.t() @ inputs / 4096
    bound = 5 / 4096**0.5
    assert float((gram - torch.eye(4)).abs().max()) < bound
    assert float(inputs.mean(dim=0).abs().max()) < bound
    assert float((inputs[1:] * inputs[:-1]).mean(dim=0).abs().max()) < bound
