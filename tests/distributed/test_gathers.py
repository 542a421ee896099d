"""What stage 3 moves equals the closed form, byte by byte, for every method."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cases import gathers as cases
from tests.distributed.cases.gathers import FEW, METHODS, REST, VARIANTS, name_of
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return run_ranks(cases.methods, 2, cases=FEW) | run_ranks(cases.variants, 2)


def check(found: dict[str, Any]) -> None:
    assert found["recorded"] == [found["expected"]] * 2
    assert found["recorded_bytes"] == [found["expected_bytes"]] * 2


@pytest.mark.parametrize("case", [*map(name_of, FEW), *VARIANTS, "fp32 gradients"])
def test_recorded_bytes_equal_the_closed_form(figures: dict[str, Any], case: str) -> None:
    check(figures[case])


def test_the_other_precisions_and_accumulations() -> None:
    figures = run_ranks(cases.methods, 2, cases=REST)
    assert figures.keys() == set(map(name_of, REST))
    for found in figures.values():
        check(found)


def gathers(found: dict[str, Any]) -> int:
    return sum(size for kind, size in found["expected"].items() if "all_gather" in kind)


def reduced(found: dict[str, Any]) -> int:
    return sum(size for kind, size in found["expected"].items() if "reduce_scatter" in kind)


def test_the_frozen_base_travels_with_the_adapters(figures: dict[str, Any]) -> None:
    moved = {method: gathers(figures[f"{method}/bf16/4"]) for method in METHODS}
    assert moved["relora"] == moved["lora"] == moved["switchlora"] > moved["full"]
    assert moved["low_rank"] < moved["full"]
    # what is reduced shrinks by the share that is trained, to the padding of a parameter each
    for method in METHODS:
        sizes = figures[f"{method}/bf16/4"]["sizes"]
        assert reduced(figures[f"{method}/bf16/4"]) == 4 * 2 * sum(n + n % 2 for n in sizes)
        assert reduced(figures[f"{method}/fp32/1"]) == 1 * 4 * sum(n + n % 2 for n in sizes)


def test_options_do_what_they_are_for(figures: dict[str, Any]) -> None:
    assert gathers(figures["everything is kept"]) < gathers(figures["relora/bf16/4"])
    once, twice = figures["one reduction"], figures["everything is kept"]
    assert 2 * reduced(once) == reduced(twice)
    assert 2 * reduced(figures["everything is kept"]) == reduced(figures["fp32 gradients"])
