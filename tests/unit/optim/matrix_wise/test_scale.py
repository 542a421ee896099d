"""Normalised gradients on slices cut anywhere."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from relora_ds.optim.matrix import MatrixSlice, MatrixUpdate, Steps, Sum
from relora_ds.optim.matrix_wise.scale import Scale
from relora_ds.optim.rectangles import rectangles

ROWS, COLS, LR, DECAY = 5, 3, 0.1, 0.2


def run(rule: Scale, cut: int, grads: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """The weight after updates by two ranks, the first of which holds `cut` elements."""
    flat = weight.clone().view(-1)
    places = [(0, cut), (cut, ROWS * COLS)]
    matrices = []
    for start, stop in places:
        pieces = tuple(rectangles(start, stop - start, COLS))
        keys = rule.state(weight.shape)
        state = {key: torch.zeros(stop - start) for key in keys}
        matrices.append(MatrixSlice("w", weight.shape, pieces, False, state))
    for number, grad in enumerate(grads, 1):
        running: list[Steps] = []
        total = torch.zeros(())
        for (start, stop), matrix in zip(places, matrices, strict=True):
            part = MatrixUpdate(
                matrix, flat[start:stop], grad.view(-1)[start:stop], number, LR, DECAY
            )
            running.append(rule.update([part]))
            request = next(running[-1])
            assert isinstance(request, Sum)
            assert request.value.numel() == rule.exchanged([weight.shape]).sums
            total = total + request.value
        for steps in running:
            with pytest.raises(StopIteration):
                steps.send(total)
    return flat.view(ROWS, COLS)


@pytest.mark.parametrize("cut", range(ROWS * COLS + 1))
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_slices_cut_anywhere_are_the_formula(
    cut: int, axis: Literal[0, 1], momentum: float | None
) -> None:
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLS, generator=draw)
    grads = [torch.randn(ROWS, COLS, generator=draw) for _ in range(3)]
    expected, kept = weight.clone(), torch.zeros(ROWS, COLS)
    for grad in grads:
        kept = grad if momentum is None else momentum * kept + (1 - momentum) * grad
        expected *= 1 - LR * DECAY
        expected -= LR * kept / kept.square().mean(axis, keepdim=True).sqrt()
    found = run(Scale(axis, momentum), cut, grads, weight)
    assert torch.allclose(found, expected, atol=1e-6)


def test_only_momentum_is_a_state() -> None:
    shape = torch.Size((4, 6))
    assert Scale().state_elements(shape) == 0
    assert Scale(momentum=0.9).state_elements(shape) == 24


def test_zero_gradients_move_nothing() -> None:
    weight = torch.ones(ROWS, COLS)
    found = run(Scale(), 7, [torch.zeros(ROWS, COLS)], weight)
    assert torch.allclose(found, weight * (1 - LR * DECAY))
