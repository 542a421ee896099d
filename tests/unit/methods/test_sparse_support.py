"""The support of the sparse part: its size, its order, where it may and may not depend on."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch

from relora_ds.methods.sltrain.support import (
    column_type,
    draw_support,
    flat_positions,
    support_size,
)


def flat(seed: int, name: str, rows: int, cols: int, count: int) -> torch.Tensor:
    return flat_positions(*draw_support(seed, name, rows, cols, count), cols)


@pytest.mark.parametrize(
    ("rows", "cols", "sparsity", "size"),
    [
        (512, 512, 0.03, 7864),
        (1376, 512, 0.03, 21135),
        (11008, 4096, 0.05, 2254438),
        (10, 10, 0.29, 29),  # 0.29 * 100 is 28.999... in floating point
        (20, 5, 0.07, 7),
    ],
)
def test_size_is_the_floor_of_the_written_share(
    rows: int, cols: int, sparsity: float, size: int
) -> None:
    assert support_size(rows, cols, sparsity) == size


@pytest.mark.parametrize(("rows", "cols"), [(64, 96), (96, 64), (1, 50), (50, 1), (7, 40000)])
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_positions_are_unique_sorted_and_inside(rows: int, cols: int, share: float) -> None:
    count = max(1, int(rows * cols * share))
    row_starts, columns = draw_support(1, "a", rows, cols, count)
    assert row_starts.dtype == torch.int32
    assert columns.dtype == (torch.int16 if cols <= 32768 else torch.int32) == column_type(cols)
    assert (int(row_starts[0]), int(row_starts[-1])) == (0, count)
    assert int(columns.min()) >= 0
    assert int(columns.max()) < cols
    positions = flat_positions(row_starts, columns, cols)
    assert positions.numel() == count
    assert bool((positions.diff() > 0).all())
    assert int(positions[-1]) < rows * cols


def test_it_is_a_function_of_seed_and_name_alone() -> None:
    first = flat(7, "model.layers.0.self_attn.q_proj", 40, 60, 100)
    torch.manual_seed(5)
    np.random.seed(5)
    flat(7, "another", 40, 60, 100)
    assert torch.equal(first, flat(7, "model.layers.0.self_attn.q_proj", 40, 60, 100))
    for seed, name in ((8, "model.layers.0.self_attn.q_proj"), (7, "model.layers.1.mlp.up_proj")):
        other = flat(seed, name, 40, 60, 100)
        shared = np.intersect1d(first.numpy(), other.numpy()).size
        assert shared < 20, "two supports of density 1/24 share 4 of 100 positions on average"


def test_the_drawn_set_does_not_change_between_releases() -> None:
    # checkpoints of a run hold the support, but exports and other topologies may derive it again
    expected = [3, 57, 100, 113, 137, 193, 239, 254]
    assert flat(42, "model.layers.0.mlp.up_proj", 16, 16, 8).tolist() == expected


def test_rows_columns_and_blocks_are_hit_uniformly() -> None:
    rows, cols, share = 320, 480, 0.05
    count = support_size(rows, cols, share)
    positions = torch.cat([flat(seed, "a", rows, cols, count) for seed in range(20)]).long()
    drawn = 20 * count
    for hit, cells in (
        (torch.bincount(positions // cols, minlength=rows), rows),
        (torch.bincount(positions % cols, minlength=cols), cols),
        (torch.bincount(positions // 9600, minlength=16), 16),
    ):
        deviation = (hit - drawn / cells).abs().max() / math.sqrt(drawn / cells)
        assert float(deviation) < 5.0
    # neighbours in a row: the share of adjacent pairs is the density
    adjacent = sum(
        int((flat(seed, "a", rows, cols, count).diff() == 1).sum()) for seed in range(20)
    )
    assert abs(adjacent - drawn * share) < 5 * math.sqrt(drawn * share)


def test_memory_is_that_of_the_support() -> None:
    rows, cols, count = 4096, 4096, 10_000
    tracemalloc.start()
    draw_support(3, "a", rows, cols, count)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < rows * cols / 4, "a permutation of all positions would take 8 bytes for each"


def test_positions_beyond_32_bits() -> None:
    row_starts = torch.tensor([0, 0, 1], dtype=torch.int32)
    columns = torch.tensor([5], dtype=torch.int32)
    assert flat_positions(row_starts, columns, 1 << 31).tolist() == [(1 << 31) + 5]
