"""Fragments as rectangles, and what a clock remembers."""

from __future__ import annotations

import pytest
import torch

from relora_ds.optim.vector_clock import Fragment, Stretch, VectorClock

ROWS, COLS = 5, 4


@pytest.mark.parametrize("start", range(ROWS * COLS))
@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_cover_any_stretch_with_three_rectangles(start: int, axis: int) -> None:
    clock = VectorClock((ROWS, COLS)[axis], axis)
    per_vector = torch.arange((ROWS, COLS)[axis]) * 100
    grid = torch.arange(ROWS).unsqueeze(1), torch.arange(COLS).unsqueeze(0)
    whole = (per_vector.unsqueeze(1 - axis) + 0 * grid[1 - axis]).reshape(-1)
    for length in range(1, ROWS * COLS - start + 1):
        flat = torch.full((length + 5,), -1, dtype=torch.int64)
        fragment = Fragment(start, 2, length, clock, COLS)
        blocks = list(fragment.blocks(flat))
        assert len(blocks) <= 3
        for block in blocks:
            assert bool((block.view == -1).all()), "an element in two blocks"
            block.view.copy_(block.along(per_vector, axis).expand_as(block.view))
        assert torch.equal(flat[2 : 2 + length], whole[start : start + length])
        assert flat[:2].tolist() == [-1, -1]
        assert flat[2 + length :].tolist() == [-1, -1, -1]


def test_a_vector_parameter_has_one_clocked_vector_per_element() -> None:
    clock, flat = VectorClock(1, axis=0), torch.zeros(3)
    (block,) = Fragment(0, 1, 1, clock, 1).blocks(flat)
    block.view.add_(block.along(torch.tensor([7.0]), 0))
    assert flat.tolist() == [0, 7, 0]


def test_stretch_is_a_live_view() -> None:
    flat = torch.zeros(6)
    stretch = Stretch(10, 2, 3)
    stretch.of(flat).fill_(1.0)
    assert flat.tolist() == [0, 0, 1, 1, 1, 0]
    assert stretch.end == 5
    assert Stretch(0, 0, 0).of(flat).numel() == 0


def test_clock_ages_and_freezes() -> None:
    clock = VectorClock(4, axis=0)
    assert clock.common_birth(0) == 0
    clock.restart(7)
    assert clock.common_birth(7) == 7
    assert clock.ages(8).tolist() == [1] * 4
    clock.restart(9, torch.tensor([1, 3]))
    assert clock.common_birth(9) is None
    assert clock.ages(10).tolist() == [3, 1, 3, 1]
    clock.restart(9)
    clock.freeze(14, torch.tensor([2]))
    assert [clock.common_birth(done) for done in (9, 13, 14)] == [None, None, 9]
    assert clock.live(13).tolist() == [True, True, False, True]
    assert clock.live(14).all()


def test_loaded_times_count_after_a_refresh() -> None:
    clock, other = VectorClock(3, axis=1), VectorClock(3, axis=1)
    other.restart(5, torch.tensor([0]))
    other.freeze(9, torch.tensor([1]))
    for name, tensor in clock.tensors().items():
        assert tensor.dtype == torch.int32
        tensor.copy_(other.tensors()[name])
    clock.refresh()
    assert clock.common_birth(20) is None
    assert clock.ages(6).tolist() == [1, 6, 6]
    assert clock.live(8).tolist() == [True, False, True]
