"""Traces of single steps."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from relora_ds.train.telemetry.trace import StepTrace


def run(trace: StepTrace, steps: range) -> None:
    for number in steps:
        with trace.step(number):
            torch.mm(torch.ones(8, 8), torch.ones(8, number))
    trace.finish()


def events(path: Path) -> list[str]:
    with gzip.open(path) as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]


def test_the_wanted_steps_are_traced_and_no_others(tmp_path: Path) -> None:
    run(StepTrace((3, 4), tmp_path / "traces", 5), range(1, 8))
    (path,) = (tmp_path / "traces").iterdir()
    assert path.name == "steps_3-4.rank5.json.gz"
    names = events(path)
    assert [name for name in names if name.startswith("step ")] == ["step 3", "step 4"]
    assert names.count("aten::mm") == 2


def test_a_run_that_ends_early_leaves_what_it_traced(tmp_path: Path) -> None:
    run(StepTrace((2, 100), tmp_path, 0), range(1, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["steps_2-3.rank0.json.gz"]


@pytest.mark.parametrize("steps", [None, (7, 9)])
def test_without_such_steps_nothing_is_written(tmp_path: Path, steps: object) -> None:
    run(StepTrace(steps, tmp_path / "traces", 0), range(1, 4))  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "traces").exists()


def test_a_trace_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "traces").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        run(StepTrace((1, 1), tmp_path / "traces", 0), range(1, 3))
    assert "no trace of steps 1 to 1" in caplog.text
