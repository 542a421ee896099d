"""A checkpoint of two processes is continued by one, two or four, at any ZeRO stage, on copies and
shares of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import reshape
from tests.distributed.cases.reshape import RARE, TARGETS
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed
PAIRS = [
    pytest.param(*place, case, marks=pytest.mark.slow if place in RARE else ())
    for place, targets in (TARGETS | RARE).items()
    for case in targets
]
Continue = Callable[[int, int], dict[str, Any]]
"""Runs that so many ranks go on with, of which so many share a model."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reshape")


@pytest.fixture(scope="module")
def uninterrupted(directory: Path) -> dict[str, list[float]]:
    return {
        case: losses
        for tensor in (1, 2)
        for case, losses in run_ranks(reshape.write, 2, directory=directory, tensor=tensor).items()
    }


@pytest.fixture(scope="module")
def continued(directory: Path, uninterrupted: dict[str, list[float]]) -> Continue:
    @functools.cache
    def go_on(size: int, tensor: int) -> dict[str, Any]:
        return run_ranks(reshape.go_on, size, directory=directory, tensor=tensor)

    return go_on


@pytest.mark.parametrize(("size", "tensor", "case"), PAIRS)
@pytest.mark.parametrize("form", ["", "_reshaped"])
def test_nothing_is_lost_on_the_way(
    continued: Continue, size: int, tensor: int, case: str, form: str
) -> None:
    """Masters, moments, exact weights with their residuals, clocks and pools, bit for bit."""
    found = continued(size, tensor)[case]
    assert found[f"differences{form}"] == []
    assert found[f"same_method{form}"]


@pytest.mark.parametrize(("size", "tensor", "case"), PAIRS)
@pytest.mark.parametrize("form", ["", "_reshaped"])
def test_the_run_goes_on_with_the_same_losses(
    continued: Continue,
    uninterrupted: dict[str, list[float]],
    size: int,
    tensor: int,
    case: str,
    form: str,
) -> None:
    # in bf16 the gradients of a step are rounded per process: the first loss is the state's alone
    exact = 1 if "bf16" in case else None
    found, expected = continued(size, tensor)[case][f"losses{form}"], uninterrupted[case]
    assert found[:exact] == pytest.approx(expected[:exact], rel=1e-5)
    assert found == pytest.approx(expected, rel=2e-3)
