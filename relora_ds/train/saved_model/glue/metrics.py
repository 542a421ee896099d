"""Metrics of GLUE. Of a constant prediction or label those that divide by its spread are 0."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
"""One number per example: the number of a class, or a similarity."""


def accuracy(predicted: Values, expected: Values) -> float:
    """Share of the examples whose class is the predicted one."""
    return float(np.mean(predicted == expected))


def f1(predicted: Values, expected: Values) -> float:
    """Harmonic mean of precision and recall of class 1."""
    hits = np.sum((predicted == 1) & (expected == 1))
    named = np.sum(predicted == 1) + np.sum(expected == 1)
    return float(2 * hits / named) if named else 0.0


def matthews(predicted: Values, expected: Values) -> float:
    """Matthews' correlation of two classes, which is Pearson's of their numbers."""
    return pearson(predicted, expected)


def pearson(predicted: Values, expected: Values) -> float:
    """Pearson's correlation coefficient."""
    left, right = predicted - predicted.mean(), expected - expected.mean()
    spread = math.sqrt(float(left @ left) * float(right @ right))
    return float(left @ right) / spread if spread else 0.0


def spearman(predicted: Values, expected: Values) -> float:
    """Pearson's correlation of the ranks, of which equal values share their mean."""
    return pearson(_ranks(predicted), _ranks(expected))


def _ranks(values: Values) -> Values:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


METRICS: dict[str, Callable[[Values, Values], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
"""Every metric by its name; takes predictions and labels, shape (examples,)."""
