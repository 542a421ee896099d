"""Metrics of GLUE against their definitions, written out example by example."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora_ds.train.saved_model.glue.metrics import METRICS

PAIRS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40)
SCORES = st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=2, max_size=40)


def measured(name: str, pairs: list[tuple[int, int]]) -> float:
    predicted, expected = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    return METRICS[name](predicted, expected)


@given(PAIRS)
def test_of_two_classes(pairs: list[tuple[int, int]]) -> None:
    hit, miss, false, right = (pairs.count(pair) for pair in ((1, 1), (0, 1), (1, 0), (0, 0)))
    assert measured("accuracy", pairs) == pytest.approx((hit + right) / len(pairs))
    precision = hit / (hit + false) if hit + false else 0.0
    recall = hit / (hit + miss) if hit + miss else 0.0
    mean = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    assert measured("f1", pairs) == pytest.approx(mean)
    spread = math.sqrt((hit + false) * (hit + miss) * (right + false) * (right + miss))
    expected = (hit * right - false * miss) / spread if spread else 0.0
    assert measured("matthews", pairs) == pytest.approx(expected, abs=1e-12)


@given(SCORES)
def test_of_similarities(pairs: list[tuple[int, int]]) -> None:
    left, right = (list(column) for column in zip(*pairs, strict=True))
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert measured("pearson", pairs) == measured("spearman", pairs) == 0.0
        return
    assert measured("pearson", pairs) == pytest.approx(
        statistics.correlation(left, right), abs=1e-9
    )
    ranks = ([statistics.fmean(_places(value, side)) for value in side] for side in (left, right))
    assert measured("spearman", pairs) == pytest.approx(statistics.correlation(*ranks), abs=1e-9)


def _places(value: int, values: list[int]) -> list[int]:
    return [place for place, each in enumerate(sorted(values)) if each == value]
