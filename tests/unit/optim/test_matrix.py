"""Matrix-wise updates on slices, cut anywhere, against the same update of whole matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_ds.optim.grouped import GroupedOptimizer, PlacedMatrix
from relora_ds.optim.matrix import (
    Exchanged,
    MatrixOptimizer,
    MatrixSlice,
    MatrixUpdate,
    Needs,
    OfWhole,
    StateTensor,
    Steps,
    Sum,
    Unit,
    drive,
    in_batches,
)
from relora_ds.optim.rectangles import rectangles
from relora_ds.optim.vector_adamw import storage_key

SHAPES = {"a": (5, 3), "b": (2, 4), "c": (1, 7)}


@dataclass(frozen=True)
class ColumnNorms(MatrixOptimizer):
    """W -= lr * G' / |columns of G|, where G' is G with its rows in the opposite order."""

    needs: ClassVar[Needs] = "rows"

    def state(self, shape: torch.Size) -> dict[str, StateTensor]:
        return {"total": StateTensor(shape, "slice")}

    def exchanged(self, shapes: Sequence[torch.Size]) -> Exchanged:
        return Exchanged(sums=sum(shape[1] for shape in shapes), to_owner=1, from_owner=1)

    def update(self, matrices: Sequence[MatrixUpdate]) -> Steps:
        (update,) = matrices
        squares = torch.zeros(update.matrix.shape[1])
        for part in update.matrix.rectangles:
            squares[part.col : part.col + part.cols] += part.of(update.grad).square().sum(0)
        norms = yield Sum(squares)
        (turned,) = yield OfWhole([[update.grad]], turn)
        update.matrix.state["total"] += turned
        for part in update.matrix.rectangles:
            scale = norms.sqrt()[part.col : part.col + part.cols]
            part.of(update.master).sub_(part.of(turned) / scale, alpha=update.lr)


def turn(matrices: torch.Tensor) -> tuple[torch.Tensor]:
    """Rows in the opposite order."""
    return (matrices.flip(1),)


class FakeExchange:
    """Answers a sum and a function of a whole matrix with what is given."""

    def __init__(self, total: torch.Tensor, part: torch.Tensor) -> None:
        self._total, self._part = total, part

    def sums(
        self, matrices: Sequence[MatrixSlice], values: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        return [self._total for _ in values]

    def of_wholes(
        self, units: Sequence[Unit], requests: Sequence[OfWhole]
    ) -> list[tuple[torch.Tensor, ...]]:
        return [(self._part,) for _ in requests]


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
    turned = grad.view(rows, cols).flip(0)
    expected = weight - 0.1 * (turned / norms.sqrt()).view(-1)
    rule, sums, parts = ColumnNorms(), torch.zeros(cols), []
    for start, stop in ((0, cut), (cut, rows * cols)):
        pieces = tuple(rectangles(start, stop - start, cols))
        matrix = MatrixSlice("a", torch.Size((rows, cols)), pieces, False)
        matrix.state["total"] = torch.zeros(stop - start)
        master = weight[start:stop].clone()
        update = MatrixUpdate(matrix, master, grad[start:stop], 1, 0.1, 0.0)
        asked = next(rule.update([update]))
        assert isinstance(asked, Sum)
        sums += asked.value
        exchange = FakeExchange(norms, turned.reshape(-1)[start:stop])
        drive([([matrix], rule.update([update]))], exchange)
        parts.append(master)
        assert torch.equal(matrix.state["total"], turned.reshape(-1)[start:stop])
    assert torch.allclose(sums, norms)
    assert torch.allclose(torch.cat(parts), expected)


def test_matrices_of_one_shape_and_function_are_computed_together() -> None:
    batches: list[torch.Size] = []

    def first(matrices: torch.Tensor) -> tuple[torch.Tensor]:
        batches.append(matrices.shape)
        return (matrices + 1,)

    def second(matrices: torch.Tensor) -> tuple[torch.Tensor]:
        batches.append(matrices.shape)
        return (matrices + 2,)

    shapes = [(2, 3), (3, 2), (2, 3), (2, 3)]
    matrices = [[torch.full(shape, float(number))] for number, shape in enumerate(shapes)]
    found = in_batches(matrices, [first, first, second, first])
    assert batches == [(2, 2, 3), (1, 3, 2), (1, 2, 3)]
    assert [float(value.mean()) for (value,) in found] == [1, 2, 4, 4]


@pytest.mark.parametrize(("device", "together"), [("cpu", [2, 1]), ("meta", [3])])
def test_a_batch_of_a_host_stays_in_its_cache(device: str, together: list[int]) -> None:
    batches: list[int] = []

    def double(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor]:
        batches.append(len(left))
        return (left + right,)

    pairs = [[torch.full((128, 256), float(n), device=device)] * 2 for n in range(3)]
    found = in_batches(pairs, [double] * 3)
    assert batches == together
    if device == "cpu":
        assert [float(value.mean()) for (value,) in found] == [0, 2, 4]


class Alone(FakeExchange):
    """One process holds everything; counts what is asked for together."""

    def __init__(self) -> None:
        self.rounds: list[tuple[str, int]] = []

    def sums(
        self, matrices: Sequence[MatrixSlice], values: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        self.rounds.append(("sum", len(values)))
        return list(values)

    def of_wholes(
        self, units: Sequence[Unit], requests: Sequence[OfWhole]
    ) -> list[tuple[torch.Tensor, ...]]:
        self.rounds.append(("whole", len(requests)))
        return [tuple(values[0] for values in request.values) for request in requests]


def test_updates_of_one_phase_travel_together() -> None:
    exchange = Alone()
    optimizer, weights = grouped(exchange)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert exchange.rounds == [("sum", 3), ("whole", 3)]


def grouped(exchange: FakeExchange) -> tuple[GroupedOptimizer, dict[str, torch.Tensor]]:
    """Three matrices under `ColumnNorms` in two groups, beside a vector under AdamW, uncut."""
    weights = {name: torch.zeros(shape).requires_grad_() for name, shape in SHAPES.items()}
    vector = torch.zeros(4).requires_grad_()
    first, *others = weights.values()
    groups = [
        {"params": [first], "matrix_wise": True},
        {"params": [vector]},
        {"params": others, "matrix_wise": True},
    ]
    optimizer = GroupedOptimizer(groups, lr=0.1)
    optimizer.exchange = exchange
    optimizer.matrices = {}
    for name, weight in weights.items():
        shape = weight.shape
        pieces = tuple(rectangles(0, weight.numel(), shape[1]))
        state = {"total": torch.zeros(weight.numel())}
        placed = PlacedMatrix(MatrixSlice(name, shape, pieces, True, state), ColumnNorms(), 0)
        optimizer.matrices[storage_key(weight)] = [placed]
    vector.grad = torch.ones(4)
    return optimizer, weights | {"vector": vector}


def test_groups_that_are_not_matrix_wise_are_adamws() -> None:
    optimizer, weights = grouped(Alone())
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
