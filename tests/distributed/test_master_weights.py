"""bf16 weights without masters: as with masters on average, and the same on every replica."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cases import master_weights
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("masters")
    return {
        ranks: run_ranks(master_weights.figures, ranks, directory=directory / str(ranks))
        for ranks in (1, 2)
    }


@pytest.mark.parametrize("name", master_weights.CASES)
def test_two_ranks_are_bit_identical_to_one(figures: dict[int, Any], name: str) -> None:
    one, two = figures[1][name], figures[2][name]
    assert one["bits"] == two["bits"]
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-6)
    assert one["norms"] == two["norms"]


@pytest.mark.parametrize("name", master_weights.CASES)
def test_training_follows_the_run_with_masters(figures: dict[int, Any], name: str) -> None:
    for found in (figures[2][name], figures[2]["accumulated"]):
        assert found["losses"] == pytest.approx(found["plain"]["losses"], rel=0.02)
        assert found["losses"][-1] < found["losses"][0]
        assert found["distance"] < 0.02
        assert found["in_bf16"] == found["parameters"] - found["edited"]


@pytest.mark.parametrize("name", master_weights.CASES)
def test_bytes_are_those_of_the_closed_form(figures: dict[int, Any], name: str) -> None:
    for found in (figures[1][name], figures[2][name], figures[2]["accumulated"]):
        measured, expected = found["measured"], found["expected"]
        assert measured["weights"] == expected["weights"]
        # scales of blocks weigh more in layers of a few hundred elements
        assert measured["states"] == pytest.approx(expected["states"], rel=0.06)
        assert measured["states"] < 0.75 * found["plain"]["measured"]["states"]
        assert measured["gradients"] <= expected["gradients"]
        assert measured["gradients"] < found["plain"]["measured"]["gradients"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_is_bit_exact_with_frozen_vectors_pending(
    figures: dict[int, Any], ranks: int
) -> None:
    found = figures[ranks]["resume"]
    assert found["pending"] > 0
    assert found["same_losses"]
    assert found["same_weights"]
