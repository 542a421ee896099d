"""Recorded traffic equals the closed form, byte by byte, and torch's profiler, call by call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from relora_ds.accounting.zero_traffic import bytes_of, control_payloads, step_payloads
from relora_ds.config.load import load_run_config
from relora_ds.methods.build import meta_model
from relora_ds.methods.registry import plan_phases
from relora_ds.parallel.zero import ZeroSettings
from tests.distributed.cases import communication
from tests.harness.ranks import run_ranks
from tests.harness.run import metrics, run, write_run
from tests.harness.warm import GROUP_TIMEOUT_MINUTES

pytestmark = pytest.mark.distributed

WORLD_SIZE = 2
METHODS, STAGES = ("full", "relora"), (0, 1, 2)
CASES = [
    f"{method}/{stage}/{precision}/{accumulation}"
    for method in METHODS
    for stage in STAGES
    for precision in ("fp32", "bf16")
    for accumulation in (1, 2)
] + [
    "no clipping, fp32, stage 0",
    "no clipping, bf16, stage 1",
    "to owners",
    "to owners, stage 1",
    "no reduce-scatter",
    "small buckets",
    "fp32 gradients",
    "bf16 gradients",
    "one reduction",
]


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return run_ranks(communication.steps, WORLD_SIZE)


@pytest.fixture(scope="module")
def hooks() -> dict[str, Any]:
    return run_ranks(communication.hooks, WORLD_SIZE)


@pytest.fixture(scope="module")
def reductions() -> dict[str, list[list[float]]]:
    return run_ranks(communication.reductions, WORLD_SIZE)


def test_every_group_is_bounded_by_the_run() -> None:
    """DeepSpeed names no timeout for its groups; torch's own default is 30 minutes."""
    timeouts = run_ranks(communication.group_timeouts, WORLD_SIZE)
    # one group waits for a host's work, which may take longer than any collective of a step
    host = max(timeouts)
    assert timeouts.count(host) == 1
    timeouts.remove(host)
    assert len(timeouts) > 1
    assert set(timeouts) == {60 * GROUP_TIMEOUT_MINUTES}


@pytest.mark.parametrize("case", CASES)
def test_recorded_bytes_equal_the_closed_form(figures: dict[str, Any], case: str) -> None:
    found = figures[case]
    assert found["recorded"] == [found["expected"]] * 2
    assert found["recorded_bytes"] == [found["expected_bytes"]] * 2


@pytest.mark.parametrize("case", CASES)
def test_recorded_calls_equal_what_gloo_ran(figures: dict[str, Any], case: str) -> None:
    assert figures[case]["calls"] == figures[case]["profiled"]


def test_the_cases_are_complete_and_exercise_padding(figures: dict[str, Any]) -> None:
    assert figures.keys() == set(CASES)
    for method in METHODS:
        elements = figures[f"{method}/2/fp32/1"]["elements"]
        assert any(count % (2 * WORLD_SIZE) for count in elements)


def test_adapters_cut_the_bytes_of_every_stage_by_their_share(figures: dict[str, Any]) -> None:
    for stage in STAGES:
        full, relora = (figures[f"{method}/{stage}/fp32/1"] for method in METHODS)
        share = sum(relora["elements"]) / sum(full["elements"])
        found = relora["recorded_bytes"][1][0] / full["recorded_bytes"][1][0]
        assert found == pytest.approx(share, rel=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_reduction_per_update_changes_no_more_than_rounding(
    reductions: dict[str, list[list[float]]], precision: str
) -> None:
    trained = {key: found for key, found in reductions.items() if precision in key}
    reference = trained[f"1/{precision}/step"]
    assert trained[f"1/{precision}/micro_batch"] == reference
    for stage in (2, 3):
        once = trained[f"{stage}/{precision}/step"]
        # clipping multiplies by a norm that each stage adds up in another order
        assert once == [pytest.approx(step, rel=1e-6) for step in reference]
        each = trained[f"{stage}/{precision}/micro_batch"]
        tolerance = 1e-6 if precision == "fp32" else 1e-2  # rounded to bf16 three times, not once
        assert each == [pytest.approx(step, rel=tolerance) for step in reference]


def test_every_way_to_a_collective_is_counted_once(hooks: dict[str, Any]) -> None:
    assert hooks["aliases"] == {
        "all_gather world 2 float32 control": (2, 2 * 24),
        "all_reduce world 2 float32 control": (3, 3 * 12),
        "all_to_all world 2 float32 control": (1, 24),
        "barrier world 2 none control": (1, 0),
        "reduce_scatter world 2 float32 control": (1, 24),
    }


def test_stopping_restores_the_original_functions(hooks: dict[str, Any]) -> None:
    assert hooks["restored"]
    assert hooks["silent_when_off"]


def test_metrics_hold_the_bytes_of_their_step(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    tiny_run["log"] = {"every": 2}  # steps that are not logged do not pile up
    tiny_run["checkpoint"] = {"every": 4}
    path = write_run(tiny_run, tmp_path / "run.yaml")
    code, output = run([str(path)], processes=WORLD_SIZE)
    assert code == 0, output
    loaded = load_run_config(path)
    train, accumulation = loaded.config.train, 2
    clip = loaded.config.optimizer.clip
    zero = ZeroSettings(2, torch.float32, accumulation=accumulation, clip=clip)
    lines = metrics(tmp_path / "run")
    for phase in plan_phases(loaded.config):
        model = meta_model(loaded.architecture, phase.method, train)
        groups = phase.method.parameter_groups(model)
        elements = [sum(p.numel() for p in group.parameters) for group in groups]
        expected = bytes_of(
            step_payloads(elements, zero, WORLD_SIZE),
            control_payloads(WORLD_SIZE, logged=True),
        )
        for step in range(phase.first_step + 1, phase.last_step + 1):
            if step in lines:
                found = lines[step]
                payload = found["communication/bytes_per_step"] - expected.payload
                wire = found["communication/wire_bytes_per_step"] - round(expected.wire)
                if found.get("method/event") == "merge":
                    # two int64 counts of the reset, and the digest of the replicas
                    assert 16 < payload < 4096
                    assert 16 < wire < 4096
                else:  # evaluation and checkpoints are not the step's
                    assert payload == wire == 0
    assert lines[6]["method/event"] == lines[9]["method/event"] == "merge"
    assert {2, 4, 8, 10} <= lines.keys()
