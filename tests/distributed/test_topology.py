"""One run looks the same at every ZeRO stage and on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cases import topology
from tests.harness.ranks import run_ranks

# hundreds of steps
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MODES = ("zero", "random", "magnitude")
STAGES = {1: (0, 3), 2: (0, 1, 2, 3), 4: (0, 3)}


@pytest.fixture(scope="module")
def figures() -> dict[int, dict[str, Any]]:
    # four ranks share few cores: one mode there
    modes = {1: MODES, 2: MODES, 4: MODES[:1]}
    return {
        size: run_ranks(topology.figures, size, modes=modes[size], stages=stages)
        for size, stages in STAGES.items()
    }


@pytest.mark.parametrize("mode", MODES)
def test_losses_do_not_depend_on_stage_or_ranks(
    figures: dict[int, dict[str, Any]], mode: str
) -> None:
    expected = figures[1][f"{mode}/0"]
    assert [event["step"] for event in expected["events"]] == [16, 32, 48]
    assert len(expected["losses"]) == topology.LONG == 4 * topology.MERGE_EVERY
    for size, stages in STAGES.items():
        for stage in stages:
            if f"{mode}/{stage}" not in figures[size]:
                continue
            found = figures[size][f"{mode}/{stage}"]
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5), (size, stage)
            shares = [event["moments_reset_fraction"] for event in found["events"]]
            wanted = [event["moments_reset_fraction"] for event in expected["events"]]
            assert shares == pytest.approx(wanted, abs=2e-3)


def test_bf16_without_clipping_is_the_same_bit_for_bit_at_all_stages() -> None:
    losses = run_ranks(topology.bf16_losses, 2)
    assert losses[0] == losses[1] == losses[2] == losses[3]
