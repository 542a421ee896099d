"""What two ranks do about a step, a weight or a place that is not to be believed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cases import guards
from tests.harness.build import STAGES
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed

CASES = [f"{method}/{kind}/{stage}" for method, kind in guards.METHODS for stage in STAGES]


@pytest.fixture(scope="module")
def skipped() -> dict[str, Any]:
    return run_ranks(guards.skipped, 2)


@pytest.fixture(scope="module")
def places() -> dict[str, Any]:
    return run_ranks(guards.places, 2)


@pytest.mark.parametrize("case", CASES)
def test_a_skipped_step_leaves_no_trace(skipped: dict[str, Any], case: str) -> None:
    assert skipped[case] == {
        "differing": [],
        "losses": True,
        "noted": [(guards.BAD, "skip")],
        "remembered": 1,
    }


def test_a_weight_that_is_not_finite_is_named_with_its_rank() -> None:
    found = run_ranks(guards.poisoned_weight, 2)
    for before, after, name in found.values():
        assert before is None
        assert after == f"{name} (rank 1)"


def test_ranks_agree_on_a_stop(places: dict[str, Any]) -> None:
    assert not places["nobody"]
    assert places["one"]


def test_a_wish_at_the_end_of_a_round_is_known_one_update_later(places: dict[str, Any]) -> None:
    # within a round nobody is asked
    assert [step for step, wanted in places["later"].items() if wanted] == [5]


def test_ranks_at_different_places_say_where_each_is(places: dict[str, Any]) -> None:
    assert "rank 0: end of step after 7 updates in phase relora" in places["step"]
    assert "rank 1: end of step after 8 updates in phase relora" in places["step"]
    assert "rank 1: merge after 7 updates" in places["event"]
    assert (
        "rank 1: end of step after 7 updates in phase relora, method state 0badcafe"
        in (places["state"])
    )
