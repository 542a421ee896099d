"""A second copy of the weights within each node changes where bytes travel, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cases import hpz
from tests.distributed.cases.hpz import NODE
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed

CASES = ["/".join(case) for case in hpz.CASES]


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return run_ranks(hpz.figures, 4)


@pytest.mark.parametrize("case", CASES)
def test_losses_stay_equal_over_merges_and_switches(figures: dict[str, Any], case: str) -> None:
    plain, near = figures[f"{case}/1"]["losses"], figures[f"{case}/{NODE}"]["losses"]
    # kernels round bf16 products by how their operands lie in memory
    assert near == (plain if case.endswith("fp32") else pytest.approx(plain, rel=2e-3))


@pytest.mark.parametrize("case", CASES)
def test_no_copy_is_stale(figures: dict[str, Any], case: str) -> None:
    found = figures[f"{case}/{NODE}"]
    assert found["stale"] == 0
    assert figures[f"{case}/1"]["copies"] == 0


@pytest.mark.parametrize("case", CASES)
def test_bytes_by_group_equal_the_closed_form(figures: dict[str, Any], case: str) -> None:
    # the first steps record the order of modules; a merge follows step 4
    assert figures[f"{case}/1"]["bytes"][2:4] == [True, True]
    assert figures[f"{case}/{NODE}"]["bytes"][2:4] == [True, True]


def test_only_what_is_trained_travels_between_nodes(figures: dict[str, Any]) -> None:
    for case in CASES:
        plain, near = figures[f"{case}/1"], figures[f"{case}/{NODE}"]
        assert near["far"] + near["near"] == plain["far"]
        assert near["far"] < 0.2 * plain["far"]
