"""One run looks the same at every ZeRO stage and on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.ranks import run_worker
from tests.distributed.topology_worker import MERGE_EVERY, MODES, STAGES, STEPS

# four starts and hundreds of steps
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("topology")
    return {
        size: run_worker("tests.distributed.topology_worker", size, directory) for size in STAGES
    }


@pytest.mark.parametrize("mode", MODES)
def test_losses_do_not_depend_on_stage_or_ranks(
    figures: dict[int, dict[str, Any]], mode: str
) -> None:
    expected = figures[1][f"{mode}/0"]
    assert [event["step"] for event in expected["events"]] == [16, 32, 48]
    assert len(expected["losses"]) == STEPS == 4 * MERGE_EVERY
    for size, stages in STAGES.items():
        for stage in stages:
            if f"{mode}/{stage}" not in figures[size]:
                continue
            found = figures[size][f"{mode}/{stage}"]
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5), (size, stage)
            shares = [event["moments_reset_fraction"] for event in found["events"]]
            wanted = [event["moments_reset_fraction"] for event in expected["events"]]
            assert shares == pytest.approx(wanted, abs=2e-3)


def test_bf16_without_clipping_is_the_same_bit_for_bit_at_all_stages(
    figures: dict[int, dict[str, Any]],
) -> None:
    losses = [figures[2][f"bf16/{stage}"]["losses"] for stage in (0, 1, 2, 3)]
    assert losses[0] == losses[1] == losses[2] == losses[3]
