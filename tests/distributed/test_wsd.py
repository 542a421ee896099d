"""A run that goes on from its stable phase is the run that was longer from the beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_resume import FIGURES, assert_same_checkpoint
from tests.harness.run import metrics, run, write_run

pytestmark = pytest.mark.distributed


def test_a_lengthened_run_equals_the_long_one(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """The stable phase ends at step 9, where the longer run merges and the shorter one does not."""
    tiny_run["schedule"] = {"name": "wsd", "warmup_steps": 2, "decay_steps": 4}
    tiny_run["checkpoint"] = {"every": 5, "keep": 2}
    tiny_run["train"]["steps"] = 13
    description = str(write_run(tiny_run, tmp_path / "run.yaml"))
    code, output = run([description, "output_dir=" + str(tmp_path / "short")])
    assert code == 0, output
    kept = sorted(path.name for path in (tmp_path / "short" / "checkpoints").glob("step_*"))
    assert kept == ["step_10", "step_13", "step_9"]
    stable = tmp_path / "short" / "checkpoints" / "step_9"
    longer = ["train.steps=17", "output_dir=" + str(tmp_path / "longer")]
    code, output = run([description, *longer, f"checkpoint.resume={stable}"])
    assert code == 0, output
    code, output = run([description, "train.steps=17", "output_dir=" + str(tmp_path / "long")])
    assert code == 0, output

    short, expected = metrics(tmp_path / "short"), metrics(tmp_path / "long")
    found = metrics(tmp_path / "longer")
    assert [_merges(lines) for lines in (short, expected, found)] == [{6}, {6, 9, 12}, {10, 12}]
    assert sorted(found) == list(range(10, 18))
    for step, line in found.items():
        assert [line.get(key) for key in FIGURES] == [expected[step].get(key) for key in FIGURES]
    assert short[11]["train/lr"] < expected[11]["train/lr"]
    last = Path("checkpoints") / "step_17"
    assert_same_checkpoint(tmp_path / "long" / last, tmp_path / "longer" / last)


def _merges(lines: dict[int, dict[str, Any]]) -> set[int]:
    """Steps that report a merge; one that is made up for is reported with the step after it."""
    return {step for step, line in lines.items() if line.get("method/event") == "merge"}
