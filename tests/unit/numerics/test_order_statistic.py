"""Distributed order statistics against `torch.kthvalue` on the whole tensor."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from relora_ds.numerics import order_statistic
from relora_ds.numerics.order_statistic import order_statistics
from tests.unit.fake_ranks import Sum, on_ranks

CPU = torch.device("cpu")


def alone(tensor: torch.Tensor) -> None:
    """The sum over one rank."""


def kth(value: torch.Tensor, rank: int) -> float:
    return float(value.abs().kthvalue(rank).values)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(2000, generator=generator)
    return {
        "normal": normal,
        "one": torch.tensor([-3.5]),
        "zeros": torch.zeros(50),
        "signed_zeros": torch.tensor([0.0, -0.0, -0.0, 1.0]),
        "tied": (normal * 3).round(),
        "equal": torch.full((100,), -0.1),
        "denormal": normal * 1e-41,
        "huge": normal * 1e38,
        "wide": normal.sign() * 10.0 ** (normal * 12),
        "neighbours": (1.0 + torch.arange(500) * 2.0**-23) * normal[:500].sign(),
        "infinite": torch.tensor([torch.inf, 1.0, -torch.inf, 2.0, 0.0]),
    }


def ranks_of(size: int) -> list[int]:
    return sorted({1, min(2, size), (size + 1) // 2, max(1, int(0.9 * size)), size})


@pytest.mark.parametrize("name", tensors())
def test_equals_kthvalue(name: str) -> None:
    value = tensors()[name]
    for rank in ranks_of(value.numel()):
        (found,) = order_statistics([value], [rank], alone, CPU)
        assert found.dtype == torch.float32
        assert found.shape == ()
        assert float(found) == kth(value, rank)


@given(
    st_numpy.arrays("float32", st.integers(1, 40), elements=st.floats(width=32, allow_nan=False)),
    st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_kthvalue_on_any_floats(array: object, data: st.DataObject) -> None:
    value = torch.from_numpy(array)
    rank = data.draw(st.integers(1, value.numel()))
    (found,) = order_statistics([value], [rank], alone, CPU)
    assert float(found) == kth(value, rank)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_many_tensors_over_ranks_with_empty_parts(size: int) -> None:
    values = list(tensors().values())
    ranks = [max(1, int(0.7 * value.numel())) for value in values]
    expected = [kth(value, rank) for value, rank in zip(values, ranks, strict=True)]
    summed: list[list[int]] = [[] for _ in range(size)]

    def rank_part(rank: int, sum_over_ranks: Sum) -> list[float]:
        parts = []
        for number, value in enumerate(values):
            # cuts that wander with the tensor, so that some parts are empty
            cuts = sorted(value.numel() * ((number * 7 + i * 3) % 5) // 4 for i in range(size - 1))
            begin, end = list(pairwise([0, *cuts, value.numel()]))[rank]
            parts.append(value[begin:end])

        def count(tensor: torch.Tensor) -> None:
            summed[rank].append(tensor.numel())
            sum_over_ranks(tensor)

        return [float(value) for value in order_statistics(parts, ranks, count, CPU)]

    assert on_ranks(size, rank_part) == [expected] * size
    # four rounds of 256 counts per tensor, however large the tensors are
    assert summed == [[256 * len(values)] * 4] * size


def test_a_rank_that_holds_nothing_gets_the_result_too() -> None:
    value = tensors()["normal"]

    def rank_part(rank: int, sum_over_ranks: Sum) -> float:
        part = value if rank else torch.empty(0)
        return float(order_statistics([part], [1800], sum_over_ranks, CPU)[0])

    assert on_ranks(2, rank_part) == [kth(value, 1800)] * 2


def test_a_part_may_be_strided_and_stays_as_it_is() -> None:
    value = tensors()["normal"]
    copy = value.clone()
    (found,) = order_statistics([value[::3]], [100], alone, CPU)
    assert float(found) == kth(value[::3], 100)
    assert torch.equal(value, copy)


@pytest.mark.parametrize("rank", [-1, 0, 5, 1000])
@pytest.mark.parametrize("value", [0.0, 1.0, torch.inf, torch.nan])
def test_a_rank_beyond_the_tensor_is_no_number(rank: int, value: float) -> None:
    beyond, inside = order_statistics([torch.full((4,), value)] * 2, [rank, 4], alone, CPU)
    assert math.isnan(beyond)
    assert float(inside) == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize("name", tensors())
def test_lanes_of_a_device_are_no_part_of_the_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(order_statistic._LANES, "cpu", 64)
    value = tensors()[name]
    for rank in ranks_of(value.numel()):
        (found,) = order_statistics([value], [rank], alone, CPU)
        assert float(found) == kth(value, rank)


def test_other_precisions_are_refused() -> None:
    with pytest.raises(AssertionError, match="float64"):
        order_statistics([torch.ones(4, dtype=torch.float64)], [1], alone, CPU)
