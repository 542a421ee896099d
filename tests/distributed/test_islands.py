"""Islands: data parallelism where they meet in every update, exact common weights where rarely."""

from __future__ import annotations

import pytest

from tests.distributed.cases import (
    islands,
    islands_galore,
    islands_in_turn,
    islands_switching,
)
from tests.harness.build import STAGES
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed

Cell = tuple[str, int, int]
"""Method, ZeRO stage, tensor-parallel size."""

USUAL: list[Cell] = [("full", 0, 1), ("relora", 3, 1), ("switchlora", 2, 1), ("galore", 1, 1)]
REST = [
    (method, stage, 1)
    for method in islands.METHODS
    for stage in STAGES
    if (method, stage, 1) not in USUAL
]
FOUR: list[tuple[str, int, int, int]] = [
    *((method, stage, 2, 2) for method in ("full", "relora", "switchlora") for stage in STAGES),
    ("sltrain", 3, 2, 2),
    ("low_rank", 2, 2, 2),
    ("lora", 1, 2, 2),
    *(("galore", stage, 2, 2) for stage in STAGES),
    *(("relora", stage, 1, 2) for stage in STAGES),
]
"""Method, ZeRO stage, tensor-parallel size and islands on four ranks."""
ALONE = [(method, stage, 1, 4) for method in islands.METHODS for stage in STAGES]
"""Four islands of one rank each."""


def test_gradients_shared_by_islands_are_data_parallelism() -> None:
    _compare(2, [(*cell, 2) for cell in USUAL])


@pytest.mark.slow
def test_every_method_shares_gradients_at_every_stage() -> None:
    _compare(2, [(*cell, 2) for cell in REST])


@pytest.mark.slow
def test_islands_of_several_ranks_share_gradients() -> None:
    _compare(4, FOUR)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_four_islands_share_gradients_under_every_method(stage: int) -> None:
    _compare(4, [cell for cell in ALONE if cell[1] == stage])


@pytest.mark.slow
def test_bf16_gradients_are_shared_to_their_rounding() -> None:
    cells = [("relora", count, stage, 1) for stage in STAGES for count in (1, 2)]
    found = run_ranks(islands.losses, 2, cells=cells, precision="bf16")
    for stage in STAGES:
        plain, apart = (found[f"relora/{count}/{stage}/1"] for count in (1, 2))
        assert apart == pytest.approx(plain, rel=2e-3), stage


def _compare(ranks: int, cells: list[tuple[str, int, int, int]]) -> None:
    """Losses of islands against those of one."""
    asked = {(method, n, stage, size) for method, stage, size, many in cells for n in (1, many)}
    found = run_ranks(islands.losses, ranks, cells=sorted(asked))
    for method, stage, size, many in cells:
        plain, apart = (found[f"{method}/{n}/{stage}/{size}"] for n in (1, many))
        assert plain[-1] < plain[0]
        assert apart == pytest.approx(plain, rel=1e-6), (method, stage, size, many)


MERGED = [("relora", 0, 1, "fp32"), ("relora", 2, 1, "fp32"), ("relora_scaled", 3, 1, "bf16")]


def test_a_merge_makes_the_mean_of_the_products_common() -> None:
    found = run_ranks(islands.common_weights, 2, cells=MERGED)
    for cell in MERGED:
        figures = found["/".join(map(str, cell))]
        apart, *together = figures["differ"]
        assert apart > 1e-3
        assert together == [0.0, 0.0]
        # the fp64 mean, to the rounding of an fp32 edit
        assert figures["error"] < 2e-7
        assert figures["bytes"]
        assert figures["drift"] < 1e-6
        assert figures["output_drift"] < (1e-5 if cell[3] == "fp32" else 3e-2)


APART = [
    ("full", 0, 1, 32),
    ("sltrain", 1, 1, 32),
    ("low_rank", 3, 1, 32),
    ("lora", 2, 1, 8),
    ("full", 3, 1, 4),
    ("full", 2, 1, 16),
]
_ERROR = {32: 1e-4, 16: 1e-2, 8: 2e-2, 4: 0.3}
"""Of a round's step, relative: rounding of masters in fp32, or of changes to fewer bits."""


def test_a_round_ends_with_one_outer_step_on_common_weights() -> None:
    found = run_ranks(islands.rounds_apart, 2, cells=APART)
    for cell in APART:
        figures = found["/".join(map(str, cell))]
        assert figures["differ"] == 0.0, cell
        assert figures["bytes"], cell
        first, second = figures["error"]
        assert first < _ERROR[cell[3]], cell
        if cell[3] == 32:
            assert second < _ERROR[32], cell


def test_rounds_begin_after_updates_that_share_gradients_and_grow() -> None:
    _check_begun_together([("full", 2), ("relora", 3)])


@pytest.mark.slow
def test_rounds_of_every_method_begin_late_and_grow() -> None:
    _check_begun_together([("lora", 0), ("low_rank", 3), ("sltrain", 2), ("switchlora", 1)])


def _check_begun_together(cells: list[tuple[str, int]]) -> None:
    found = run_ranks(islands.begun_together, 2, cells=cells)
    for cell, figures in found.items():
        relora = cell.startswith("relora")
        apart = {6, 9, 10} if relora else {4, 6, 8, 9, 10}
        assert figures["losses"][:5] == pytest.approx(figures["plain"], rel=1e-6), cell
        assert {n for n, value in enumerate(figures["differ"]) if value > 0} == apart, cell
        short = ["nothing", "weights", "nothing", "merged" if relora else "weights"]
        long = ["nothing", "nothing", "nothing", "weights"]
        assert figures["sent"] == [*["gradients"] * 4, *short, *long], cell


IN_TURN: list[islands_in_turn.InTurn] = [
    ("full", 1, 1, 32, (4, 3, 2)),
    ("relora", 2, 1, 32, (2, 2, 1)),
    ("full", 3, 1, 4, (4, 3, 3)),
]
IN_TURN_MORE: list[islands_in_turn.InTurn] = [
    ("full", 0, 1, 32, (4, 4, 0)),
    ("full", 3, 1, 32, (4, 1, 3)),
    ("relora", 0, 1, 32, (4, 2, 3)),
    ("relora", 3, 1, 32, (4, 4, 1)),
    ("sltrain", 2, 1, 8, (4, 2, 2)),
    ("lora", 1, 1, 16, (2, 2, 0)),
]


def test_fragments_travel_in_turn_while_islands_train() -> None:
    _check_in_turn(2, IN_TURN, steps=8)


@pytest.mark.slow
def test_fragments_travel_at_every_stage_with_several_ranks() -> None:
    _check_in_turn(2, IN_TURN_MORE, steps=12)
    _check_in_turn(2, [("full", 1, 1, 32, (4, 3, 2))], steps=12, ramp=((4, 2),))
    _check_in_turn(4, [("full", 2, 1, 32, (4, 3, 2)), ("relora", 3, 1, 32, (4, 3, 2))], steps=8)
    _check_in_turn(4, [("relora", 1, 2, 8, (4, 3, 2)), ("full", 3, 2, 4, (4, 2, 1))], steps=8)


def _check_in_turn(
    ranks: int,
    cells: list[islands_in_turn.InTurn],
    steps: int,
    ramp: tuple[tuple[int, int], ...] = (),
) -> None:
    found = run_ranks(islands_in_turn.in_turn, ranks, cells=cells, steps=steps, ramp=ramp)
    for cell in cells:
        figures = found["/".join(map(str, cell))]
        assert figures["bytes"], cell
        before, after = figures["differ"]
        assert (before > 0, after) == (True, 0.0), cell
        assert figures["losses"][-1] < figures["losses"][0], cell
        if cell[3] == 32:
            assert figures["losses"] == pytest.approx(figures["plain"], rel=1e-6), cell
            assert figures["error"] < 1e-5, cell


SWITCHING: list[islands_switching.Switching] = [(1, 1, 32), (3, 1, 32), (2, 1, 8)]


def test_vectors_that_are_due_in_a_round_are_switched_at_its_end() -> None:
    _check_switching(2, SWITCHING)


@pytest.mark.slow
def test_switches_end_rounds_of_several_ranks_at_every_stage() -> None:
    _check_switching(2, [(0, 1, 32), (2, 1, 32)])
    _check_switching(4, [*((stage, 2, 32) for stage in STAGES), (1, 1, 32), (3, 1, 4)])


def _check_switching(ranks: int, cells: list[islands_switching.Switching]) -> None:
    found = run_ranks(islands_switching.switching, ranks, cells=cells, steps=14)
    for cell in cells:
        figures = found["/".join(map(str, cell))]
        # rounds of two, and of four behind them
        common = {number for number, value in enumerate(figures["differ"], 1) if value == 0.0}
        assert common == {2, 4, 8, 12}, cell
        assert figures["bytes"], cell
        switched, expected = figures["switched"]
        assert switched == expected > 50, cell
        assert figures["drift"] < 1e-6, cell
        assert figures["losses"][-1] < figures["losses"][0], cell
        if cell[2] == 32:
            assert figures["losses"] == pytest.approx(figures["plain"], rel=1e-6), cell
            assert figures.get("error", 0.0) < 1e-5, cell


REFRESHING: list[islands_galore.Refreshing] = [(1, 1, 32)]


def test_bases_are_chosen_from_the_gradients_of_all_islands() -> None:
    _check_refreshing(2, REFRESHING)


@pytest.mark.slow
def test_bases_are_chosen_between_rounds_at_every_stage_with_several_ranks() -> None:
    _check_refreshing(2, [(0, 1, 32), (2, 1, 8), (3, 1, 32)])
    _check_refreshing(4, [(1, 1, 32), (3, 1, 4), *((stage, 2, 32) for stage in STAGES)])
    found = run_ranks(islands_galore.refreshing, 2, cells=REFRESHING, fragments=2, overlap=1)
    assert found["1/1/32"]["common"] == [8]
    assert found["1/1/32"]["refreshed"] == [0, 8]


def _check_refreshing(ranks: int, cells: list[islands_galore.Refreshing]) -> None:
    found = run_ranks(islands_galore.refreshing, ranks, cells=cells)
    for cell in cells:
        figures = found["/".join(map(str, cell))]
        assert figures["common"] == [4, 8, 12], cell
        assert figures["refreshed"] == [0, 8], cell
        assert figures["bytes"], cell
        assert figures["losses"][-1] < figures["losses"][0], cell
        if cell[2] == 32:
            assert figures["losses"] == pytest.approx(figures["plain"], rel=1e-6), cell
            assert figures.get("error", 0.0) < 1e-5, cell


def test_an_island_with_another_weight_is_found_where_weights_are_common() -> None:
    said = run_ranks(islands.flipped_bits, 2)
    name = "q_proj.weight"
    assert (said["1: sound"], said["2: sound"]) == ("", "")
    assert name in said["1: after one"]
    assert said["2: after one"] == ""
    assert name in said["2: after two"]


@pytest.mark.slow
def test_rounds_of_islands_with_several_ranks() -> None:
    cells = [("full", 2, 1, 32), ("sltrain", 1, 2, 8), ("low_rank", 3, 1, 4)]
    found = run_ranks(islands.rounds_apart, 4, cells=cells)
    merged = run_ranks(
        islands.common_weights, 4, cells=[("relora", 2, 1, "fp32"), ("relora", 3, 2, "fp32")]
    )
    assert all(each["differ"] == 0.0 and each["bytes"] for each in found.values())
    for each in merged.values():
        assert each["differ"][1:] == [0.0, 0.0]
        assert each["error"] < 2e-7
        assert each["bytes"]
