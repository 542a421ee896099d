"""Matrix-wise updates on slices, cut anywhere, against the same update of whole matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_ds.optim.grouped import GroupedOptimizer, PlacedMatrix
from relora_ds.optim.matrix import (
    MatrixOptimizer,
    MatrixSlice,
    MatrixUpdate,
    Needs,
    StateTensor,
    Steps,
    Sum,
    ToOwner,
    drive,
)
from relora_ds.optim.rectangles import rectangles
from relora_ds.optim.vector_adamw import storage_key

SHAPES = {"a": (5, 3), "b": (2, 4), "c": (1, 7)}


class ColumnNorms(MatrixOptimizer):
    """W -= lr * G / |columns of G|, and the owner keeps a running sum of whole gradients."""

    needs: ClassVar[Needs] = "rows"

    def state(self, shape: torch.Size) -> dict[str, StateTensor]:
        return {"total": StateTensor(shape, "owner")}

    def exchanged(self, shapes: Sequence[torch.Size]) -> int:
        return sum(shape[1] + shape.numel() for shape in shapes)

    def update(self, matrices: Sequence[MatrixUpdate]) -> Steps:
        (update,) = matrices
        squares = torch.zeros(update.matrix.shape[1])
        for part in update.matrix.rectangles:
            squares[part.col : part.col + part.cols] += part.of(update.grad).square().sum(0)
        norms = yield Sum(squares)
        assert norms is not None
        whole = yield ToOwner(update.grad)
        assert (whole is not None) is update.matrix.owner
        if whole is not None:
            update.matrix.state["total"] += whole
        for part in update.matrix.rectangles:
            scale = norms.sqrt()[part.col : part.col + part.cols]
            part.of(update.master).sub_(part.of(update.grad) / scale, alpha=update.lr)


class FakeExchange:
    """Ranks of one process: each has driven its updates as far as the same request."""

    def __init__(self, answers: list[torch.Tensor | None]) -> None:
        self._answers = answers
        self.asked: list[torch.Tensor] = []

    def sums(
        self, matrices: Sequence[MatrixSlice], values: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        return [self._answer(value) for value in values]

    def to_owners(
        self, matrices: Sequence[MatrixSlice], slices: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        found = [self._answer(part) for part in slices]
        return [part if m.owner else None for m, part in zip(matrices, found, strict=True)]

    def _answer(self, value: torch.Tensor) -> torch.Tensor:
        self.asked.append(value.clone())
        answer = self._answers[len(self.asked) - 1]
        return torch.zeros_like(value) if answer is None else answer


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_rectangles_tile_any_stretch(start: int, count: int, cols: int) -> None:
    table = torch.arange(100 * cols).view(100, cols)
    flat = table.view(-1)[start : start + count]
    parts = list(rectangles(start, count, cols, row=7, col=11))
    assert len(parts) <= 3
    at = 0
    for part in parts:
        assert part.at == at
        rows = slice(part.row - 7, part.row - 7 + part.rows)
        here = table[rows, part.col - 11 : part.col - 11 + part.cols]
        assert torch.equal(part.of(flat), here)
        at += part.rows * part.cols
    assert at == count


@pytest.mark.parametrize("cut", range(16))
def test_slices_cut_anywhere_are_the_whole_matrix(cut: int) -> None:
    rows, cols = SHAPES["a"]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows * cols, generator=generator)
    grad = torch.randn(rows * cols, generator=generator)
    norms = grad.view(rows, cols).square().sum(0)
    expected = weight - 0.1 * (grad.view(rows, cols) / norms.sqrt()).view(-1)
    rule, sums, parts = ColumnNorms(), torch.zeros(cols), []
    for number, (start, stop) in enumerate(((0, cut), (cut, rows * cols))):
        pieces = tuple(rectangles(start, stop - start, cols))
        matrix = MatrixSlice("a", torch.Size((rows, cols)), pieces, number == 1)
        matrix.state["total"] = torch.zeros(rows, cols)
        master = weight[start:stop].clone()
        update = MatrixUpdate(matrix, master, grad[start:stop], 1, 0.1, 0.0)
        # both ranks: what they ask for first, then everything with the sums as answers
        asked = next(rule.update([update]))
        assert isinstance(asked, Sum)
        sums += asked.value
        exchange = FakeExchange([norms, grad.view(rows, cols)])
        drive([(matrix, rule.update([update]))], exchange)
        parts.append(master)
        assert bool(matrix.state["total"].any()) is (number == 1)
    assert torch.allclose(sums, norms)
    assert torch.allclose(torch.cat(parts), expected)


def test_updates_of_one_phase_travel_together() -> None:
    rounds: list[tuple[str, int]] = []

    class Counting(FakeExchange):
        def sums(
            self, matrices: Sequence[MatrixSlice], values: Sequence[torch.Tensor]
        ) -> list[torch.Tensor]:
            rounds.append(("sum", len(values)))
            return list(values)

        def to_owners(
            self, matrices: Sequence[MatrixSlice], slices: Sequence[torch.Tensor]
        ) -> list[torch.Tensor | None]:
            rounds.append(("whole", len(slices)))
            return [part.view(m.shape) for m, part in zip(matrices, slices, strict=True)]

    optimizer, weights = grouped(Counting([]))
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert rounds == [("sum", 3), ("whole", 3)]


def grouped(exchange: FakeExchange) -> tuple[GroupedOptimizer, dict[str, torch.Tensor]]:
    """Three matrices under `ColumnNorms` beside a vector under AdamW, uncut."""
    weights = {name: torch.zeros(shape).requires_grad_() for name, shape in SHAPES.items()}
    vector = torch.zeros(4).requires_grad_()
    groups = [{"params": list(weights.values()), "rule": "norms"}, {"params": [vector]}]
    optimizer = GroupedOptimizer(groups, {"norms": ColumnNorms()}, lr=0.1)
    optimizer.exchange = exchange
    optimizer.matrices = {}
    for name, weight in weights.items():
        shape = weight.shape
        pieces = tuple(rectangles(0, weight.numel(), shape[1]))
        matrix = MatrixSlice(name, shape, pieces, True, {"total": torch.zeros(shape)})
        optimizer.matrices[storage_key(weight)] = [PlacedMatrix(matrix, 0)]
    vector.grad = torch.ones(4)
    return optimizer, weights | {"vector": vector}


def test_groups_without_a_rule_are_adamws() -> None:
    optimizer, weights = grouped(FakeExchange([]))
    optimizer.step()
    assert weights["vector"].tolist() == pytest.approx([-0.1] * 4)
    assert optimizer.state[weights["vector"]].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert not weights["a"].any(), "no gradient, no update"


def test_pairs_are_the_factors_of_one_projection() -> None:
    class Pairs(ColumnNorms):
        needs: ClassVar[Needs] = "pair"

    names = ["x.q.lora_B", "x.k.lora_A", "x.q.lora_A", "x.k.lora_B"]
    assert Pairs().units(names) == [("x.q.lora_A", "x.q.lora_B"), ("x.k.lora_A", "x.k.lora_B")]
    with pytest.raises(ValueError, match=r"x\.k has no lora_A and lora_B"):
        Pairs().units(names[:3])


def test_state_counts_every_tensor_once() -> None:
    assert ColumnNorms().state_elements(torch.Size((5, 3))) == 15
