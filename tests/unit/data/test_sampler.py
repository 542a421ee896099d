"""The order of samples: proportions, permutations, and independence of how a batch is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_ds.data.sampler import MAX_PERIOD, Blend, SampleOrder, num_samples, rank_positions
from relora_ds.errors import DataError


@pytest.mark.parametrize(
    ("tokens", "samples"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (1025, 256)]
)
def test_num_samples_shares_one_token_between_neighbours(tokens: int, samples: int) -> None:
    assert num_samples(tokens, seq_length=4) == samples


@pytest.mark.parametrize("cut", [(1, 1), (1, 4), (2, 3), (3, 2), (6, 4), (24, 1)])
def test_global_batch_does_not_depend_on_the_cut(cut: tuple[int, int]) -> None:
    micro_batch_size, dp_size = cut
    ranks = [rank_positions(5, 24, micro_batch_size, rank, dp_size) for rank in range(dp_size)]
    assert {positions.shape for positions in ranks} == {(24 // micro_batch_size // dp_size, cut[0])}
    np.testing.assert_array_equal(np.stack(ranks, axis=1).ravel(), np.arange(120, 144))


def prefix_counts(blend: Blend, count: int) -> np.ndarray:
    """Uses of each dataset after 1, 2, ..., `count` samples."""
    datasets, _ = blend.locate(np.arange(count))
    return np.cumsum(datasets[:, None] == np.arange(len(blend.shares)), axis=0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_every_prefix_honours_the_weights(weights: list[int]) -> None:
    blend = Blend(weights)
    count = 3 * len(blend.slots) // 2
    wanted = np.arange(1, count + 1)[:, None] * blend.shares
    assert np.abs(prefix_counts(blend, count) - wanted).max() <= 1


def test_awkward_weights_are_met_to_the_finest_share() -> None:
    blend = Blend([np.pi, np.e, 1e-3, 7**0.5])
    assert np.abs(blend.slots_of / len(blend.slots) - blend.shares).max() < 1 / MAX_PERIOD
    share = blend.slots_of / len(blend.slots)
    wanted = np.arange(1, len(blend.slots) + 1)[:, None] * share
    assert np.abs(prefix_counts(blend, len(blend.slots)) - wanted).max() <= 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(0, 10**9))
def test_uses_count_what_came_before(weights: list[float], number: int) -> None:
    blend = Blend(weights)
    dataset, uses = blend.locate(np.asarray([number]))
    assert blend.uses(number)[dataset[0]] == uses[0]
    assert blend.uses(number).sum() == number
    assert blend.uses(number + 1)[dataset[0]] == uses[0] + 1


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [1.0, np.nan], [1.0, np.inf]])
def test_weights_must_be_positive(weights: list[float]) -> None:
    with pytest.raises(DataError, match="must all be positive numbers"):
        Blend(weights)


def test_share_that_cannot_be_met() -> None:
    with pytest.raises(DataError, match="at least 1/16384"):
        Blend([1.0, 1e-6])


def test_every_epoch_is_a_fresh_permutation() -> None:
    order = SampleOrder(sizes=(50,), weights=(1.0,), seed=7)
    datasets, samples = order.locate(np.arange(200))
    assert not datasets.any()
    epochs = samples.reshape(4, 50)
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert tuple(epochs[0]) != tuple(range(50))


def test_epochs_of_a_blend_are_exact() -> None:
    order = SampleOrder(sizes=(10, 25), weights=(0.7, 0.3), seed=1)
    datasets, samples = order.locate(np.arange(400))
    for dataset, size in enumerate(order.sizes):
        used = samples[datasets == dataset]
        for start in range(0, len(used) - size + 1, size):
            assert sorted(used[start : start + size]) == list(range(size))


def test_any_number_is_found_on_its_own() -> None:
    order = SampleOrder(sizes=(10, 25, 3), weights=(5.0, 3.0, 1.0), seed=3)
    numbers = np.arange(300).reshape(6, 50)
    datasets, samples = order.locate(numbers)
    for row in range(6):
        again = order.locate(numbers[row])
        np.testing.assert_array_equal(again, (datasets[row], samples[row]))


def test_seed_and_place_in_the_blend_change_the_order() -> None:
    numbers = np.arange(100)
    first = SampleOrder((100,), (1.0,), seed=1).locate(numbers)[1]
    assert not np.array_equal(first, SampleOrder((100,), (1.0,), seed=2).locate(numbers)[1])
    datasets, samples = SampleOrder((100, 100), (1.0, 1.0), seed=1).locate(np.arange(200))
    assert not np.array_equal(samples[datasets == 0], samples[datasets == 1])


def test_known_order() -> None:
    """The order is a promise to runs that resume under a later version."""
    datasets, samples = SampleOrder((5, 4), (2.0, 1.0), seed=42).locate(np.arange(9))
    assert datasets.tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert samples.tolist() == [3, 0, 0, 2, 1, 4, 1, 3, 3]
