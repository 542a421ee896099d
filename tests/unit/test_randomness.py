"""Draws are pure functions of their coordinates, look random, and never change between versions."""

from __future__ import annotations

import hashlib
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_ds import randomness
from relora_ds.randomness import Stream

MASK = (1 << 64) - 1
STREAM = Stream(42, "init", "model.layers.0.self_attn.q_proj.weight", 0)
DRAWS = ("words", "uniform", "normal")
COUNT = 1 << 20
SIZES = [1, 2, 3, 4, 5, 7, 8, 11, 16, 17, 31, 64, 65, 97, 255, 256, 257, 1009, 4096, 4097, 10_007]


def splitmix_finalise(word: int) -> int:
    """The published constants, on Python's unbounded integers."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def reference_word(stream: Stream, index: int) -> int:
    text = "\x1f".join(map(str, (stream.seed, stream.purpose, stream.name, stream.event)))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    first, second = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8))
    mixed = splitmix_finalise((index * 0x9E3779B97F4A7C15 + first) & MASK)
    return splitmix_finalise(mixed ^ second)


def unsigned(words: torch.Tensor) -> list[int]:
    return [int(word) & MASK for word in words]


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def test_shorts_are_the_quarters_of_the_words() -> None:
    quarters = [(reference_word(STREAM, i) >> 16 * j) & 0xFFFF for i in range(9) for j in range(4)]
    for start, count in ((0, 36), (1, 1), (6, 17), (35, 1)):
        assert STREAM.shorts(start, count).tolist() == quarters[start : start + count]
    counts = torch.bincount(STREAM.shorts(0, COUNT) >> 8, minlength=256)
    assert len(counts) == 256
    assert float((counts - COUNT / 256).abs().max()) < 5 * (COUNT / 256) ** 0.5


def test_golden_values() -> None:
    """A resumed run draws what its first part drew: these numbers may never change."""
    assert STREAM.key == (10291092491247658535, 693448995817836489)
    assert unsigned(STREAM.words(0, 4)) == [
        0x841B529614662C25,
        0x59F92646AB566AD1,
        0x8ACA9C59650716ED,
        0xF042098E056F0C8F,
    ]
    expected = [0.5160418748855591, 0.35145795345306396, 0.54215407371521, 0.938507616519928]
    assert STREAM.uniform(0, 4).tolist() == expected
    expected = [1.0090925693511963, -0.7023521065711975, -0.8727920055389404, 0.35310664772987366]
    assert STREAM.normal(0, 4).tolist() == pytest.approx(expected, abs=1e-7)
    assert STREAM.permutation(10)(np.arange(10)).tolist() == [8, 5, 7, 6, 9, 4, 2, 1, 0, 3]
    large = Stream(1, "data_order", "0", 3).permutation(1_000_003)
    assert large(np.arange(5)).tolist() == [250917, 176619, 169788, 374498, 250804]


@pytest.mark.parametrize("index", [0, 1, 12345, (1 << 40) + 7, (1 << 63) - 2])
def test_words_are_the_documented_hash(index: int) -> None:
    assert unsigned(STREAM.words(index, 1)) == [reference_word(STREAM, index)]


@pytest.mark.parametrize("draw", DRAWS)
@given(start=st.integers(0, 3000), count=st.integers(0, 1000))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_slice_is_the_slice_of_the_whole(draw: str, start: int, count: int) -> None:
    whole = getattr(STREAM, draw)(0, 4000)
    assert torch.equal(getattr(STREAM, draw)(start, count), whole[start : start + count])


@pytest.mark.parametrize("draw", DRAWS[1:])
def test_hashing_by_chunks_changes_nothing(draw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = getattr(STREAM, draw)(5, 1000)
    monkeypatch.setattr(randomness, "_CHUNK", 64)
    assert torch.equal(getattr(STREAM, draw)(5, 1000), whole)


@pytest.mark.parametrize(
    "other",
    [
        Stream(43, "init", "a.weight", 1),
        Stream(42, "lora_A", "a.weight", 1),
        Stream(42, "init", "b.weight", 1),
        Stream(42, "init", "a.weight", 2),
        Stream(-42, "init", "a.weight", 1),
        # the same characters, cut elsewhere
        Stream(42, "inita", ".weight", 1),
    ],
)
def test_every_coordinate_gives_an_independent_stream(other: Stream) -> None:
    stream = Stream(42, "init", "a.weight", 1)
    assert torch.equal(stream.uniform(0, 100), Stream(42, "init", "a.weight", 1).uniform(0, 100))
    x, y = stream.uniform(0, COUNT), other.uniform(0, COUNT)
    assert abs(correlation(x, y)) < 5 / math.sqrt(COUNT)
    assert int((x == y).sum()) <= 2  # 0.06 expected on a grid of 2^24


def test_draws_leave_the_global_generators_alone() -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(2), np.random.rand(2)
    torch.manual_seed(3)
    np.random.seed(3)
    first = STREAM.normal(0, 100)
    STREAM.permutation(50)(np.arange(50))
    assert torch.equal(torch.rand(2), expected[0])
    assert np.array_equal(np.random.rand(2), expected[1])
    assert torch.equal(STREAM.normal(0, 100), first)


def test_every_bit_is_balanced_and_independent_of_its_neighbour() -> None:
    words = STREAM.words(0, 1 << 17)
    bits = torch.stack([(words >> bit) & 1 for bit in range(64)]).double()
    bound = 5 / math.sqrt(words.numel())
    assert float((bits.mean(dim=1) - 0.5).abs().max()) < bound / 2
    correlations = torch.corrcoef(bits).fill_diagonal_(0.0)
    assert float(correlations.abs().max()) < bound
    for lag in (1, 2, 64, 4096):
        serial = ((bits[:, lag:] - 0.5) * (bits[:, :-lag] - 0.5)).mean(dim=1) * 4.0
        assert float(serial.abs().max()) < bound, lag


def test_uniform_moments_and_histogram() -> None:
    x = STREAM.uniform(0, COUNT)
    assert x.dtype == torch.float32
    assert float(x.min()) >= 0.0
    assert float(x.max()) < 1.0
    assert torch.equal(x * 2**24, (x * 2**24).round())
    assert float(x.double().mean()) == pytest.approx(0.5, abs=5 / math.sqrt(12 * COUNT))
    assert float(x.double().var()) == pytest.approx(1 / 12, rel=5e-3)
    counts = torch.bincount((x * 256).long(), minlength=256).double()
    chi_square = float(((counts - COUNT / 256) ** 2 / (COUNT / 256)).sum())
    # 255 degrees of freedom: neither too uneven nor too even
    assert 255 - 5 * math.sqrt(510) < chi_square < 255 + 5 * math.sqrt(510)
    for lag in (1, 7, 1024):
        assert abs(correlation(x[lag:], x[:-lag])) < 5 / math.sqrt(COUNT)


def test_normal_moments_and_tails() -> None:
    x = STREAM.normal(0, COUNT)
    assert x.dtype == torch.float32
    z = x.double()
    assert float(z.mean()) == pytest.approx(0.0, abs=5 / math.sqrt(COUNT))
    assert float(z.std()) == pytest.approx(1.0, abs=5 / math.sqrt(2 * COUNT))
    assert float((z**3).mean()) == pytest.approx(0.0, abs=5 * math.sqrt(15 / COUNT))
    assert float((z**4).mean()) == pytest.approx(3.0, abs=5 * math.sqrt(96 / COUNT))
    for bound in (0.5, 1.0, 2.0, 3.0, 4.0):
        share = math.erfc(bound / math.sqrt(2.0))
        spread = 5 * math.sqrt(share / COUNT)
        assert float((z.abs() > bound).double().mean()) == pytest.approx(share, abs=spread)
    assert abs(correlation(x[1:], x[:-1])) < 5 / math.sqrt(COUNT)


def test_normal_is_finite_at_the_ends_of_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([0, -1, 1 << 62, -(1 << 63)], dtype=torch.int64)
    monkeypatch.setattr(Stream, "words", lambda *_: ends)
    draws = STREAM.normal(0, 4)
    assert draws.isfinite().all()
    assert float(draws.abs().max()) < 7.0


@pytest.mark.parametrize("size", SIZES)
def test_permutation_is_a_bijection(size: int) -> None:
    image = STREAM.permutation(size)(np.arange(size))
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permutation_of_part_of_the_indices_in_any_shape() -> None:
    permutation = STREAM.permutation(1000)
    whole = permutation(np.arange(1000))
    index = np.array([[3, 999], [0, 3]])
    assert np.array_equal(permutation(index), whole[index])
    assert permutation(np.array(17)).shape == ()
    assert permutation(np.array(17)) == whole[17]
    assert permutation(np.empty(0, dtype=np.int64)).shape == (0,)


def test_permutation_of_a_huge_range_stays_inside_and_repeats_nothing() -> None:
    size = (1 << 40) + 3
    index = np.concatenate([np.arange(5000), size - 1 - np.arange(5000)])
    image = STREAM.permutation(size)(index)
    assert image.min() >= 0
    assert image.max() < size
    assert np.unique(image).size == index.size


@pytest.mark.parametrize("index", [[-1], [10], [0, 11]])
def test_permutation_refuses_indices_outside(index: list[int]) -> None:
    with pytest.raises(IndexError, match="10 elements"):
        STREAM.permutation(10)(np.array(index))


def test_small_permutations_are_equally_likely() -> None:
    draws, orders = 4800, list(permutations(range(4)))
    counts = dict.fromkeys(orders, 0)
    for event in range(draws):
        image = Stream(7, "order", "", event).permutation(4)(np.arange(4))
        counts[tuple(image.tolist())] += 1
    expected = draws / len(orders)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 23 + 5 * math.sqrt(46)


def test_large_permutation_has_no_trace_of_the_order() -> None:
    size = 100_003
    index = np.arange(size)
    image = Stream(1, "data_order", "0", 0).permutation(size)(index)
    again = Stream(1, "data_order", "0", 1).permutation(size)(index)
    bound = 5 / math.sqrt(size)
    assert abs(np.corrcoef(index, image)[0, 1]) < bound
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < bound
    assert abs(np.corrcoef(image, again)[0, 1]) < bound
    assert int((image == index).sum()) <= 8  # 1 expected
    assert int((np.diff(image) == 1).sum()) <= 8
