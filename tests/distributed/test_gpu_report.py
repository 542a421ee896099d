"""`tools/gpu_report.py` on a CPU: all of its code runs, and what it says of failures is true."""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import report
from benchmarks.gpu.case import Case, CaseSkippedError, Figures, Sizes
from benchmarks.gpu.cases.catalogue import STAGES
from benchmarks.gpu.processes import Outcome
from tests.harness.ranks import ROOT

pytestmark = pytest.mark.distributed


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "report.jsonl").open()]


def test_all_of_it_runs_in_a_short_while(tmp_path: Path) -> None:
    command = [sys.executable, "tools/gpu_report.py", "all", "--device", "cpu", "--tiny"]
    command += ["--budget", "550", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) <= 61  # the machine, and the table
    lines = _lines(tmp_path)
    assert {line["stage"] for line in lines if line["status"] == "PASS"} == set(STAGES)
    # only what a CPU lacks is left out, and said to be
    skipped = [line["message"] for line in lines if line["status"] == "SKIP"]
    assert len(skipped) < len(lines) / 4
    assert not [message for message in skipped if "time" in message]
    for line in lines:
        assert line["device"].startswith("CPU")
        assert {"date", "torch", "cuda", "driver", "clocks"} <= line.keys()


def passes(device: torch.device, sizes: Sizes) -> Figures:
    return {"device": device.type, "tiny": sizes.tiny}


def fails(device: torch.device, sizes: Sizes) -> Figures:
    raise ValueError("a reason\nand more of it")


def lacks(device: torch.device, sizes: Sizes) -> Figures:
    raise CaseSkippedError("there is none")


def dies(device: torch.device, sizes: Sizes) -> Figures:
    faulthandler.disable()  # or its stack stands in the output of the tests
    os.abort()


def hangs(device: torch.device, sizes: Sizes) -> Figures:
    while True:
        time.sleep(1)


def leaves_one_rank(device: torch.device, sizes: Sizes) -> Figures:
    if os.environ["RANK"] == "1":
        os._exit(3)
    time.sleep(60)
    return {}


@pytest.mark.parametrize("fork", [True, False])
def test_a_fault_or_a_hang_is_the_end_of_one_case_only(
    tmp_path: Path, fork: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # an interpreter of its own takes seconds to start
    functions = (dies, fails, lacks, passes) if fork else (passes,)
    cases = [Case("A", function.__name__, function) for function in functions]
    cases.append(Case("A", "hangs", hangs, limit_s=2))
    cases.append(Case("B", "rank", leaves_one_rank, ranks=2))
    monkeypatch.setattr(report, "cases_of", lambda verb, tiny: cases)
    monkeypatch.setattr(report, "can_fork", lambda device, logs: fork)
    monkeypatch.setattr(report, "describe", lambda device: {"device": device})
    started = time.monotonic()
    code = report.run_report("checks", "cpu", True, 100, tmp_path)
    assert code == 1
    assert time.monotonic() - started < 50
    found = {line["case"]: (line["status"], line["message"]) for line in _lines(tmp_path)}
    assert found["passes"] == ("PASS", "")
    if fork:
        assert found["dies"][0] == "FAIL"
        assert found["lacks"] == ("SKIP", "there is none")
        assert found["fails"] == ("FAIL", "ValueError: a reason")
    assert found["hangs"] == ("FAIL", "rank 0: killed, its time was over")
    assert "rank 1: exit code 3" in found["rank"][1]


def test_cases_that_do_not_fit_the_budget_are_said_to_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        Case("A", "poor", passes, expected_s=50, value=1),
        Case("A", "rich", passes, expected_s=5, value=50),
        Case("B", "other", passes, expected_s=10, value=1),
    ]
    monkeypatch.setattr(report, "cases_of", lambda verb, tiny: cases)
    assert report.run_report("checks", "cpu", False, 100, tmp_path) == 0
    found = {line["case"]: (line["status"], line["message"]) for line in _lines(tmp_path)}
    assert _lines(tmp_path)[0]["case"] == "rich"
    assert found["rich"][0] == found["other"][0] == "PASS"
    assert found["poor"] == ("SKIP", "the time of stage A is used up: give a larger --budget")


def test_the_table_is_short_and_begins_with_failures() -> None:
    def outcomes(status: Any, count: int) -> list[tuple[Case, Outcome]]:
        cases = [Case("B", f"{status} {n}", passes) for n in range(count)]
        return [(case, Outcome(status, 1.0, {"x": 2.0}, "why " * 99)) for case in cases]

    lines = report.table(outcomes("PASS", 70) + outcomes("SKIP", 5) + outcomes("FAIL", 4))
    assert len(lines) == 60
    assert [line[:4] for line in lines[:10]] == ["FAIL"] * 4 + ["SKIP"] * 5 + ["PASS"]
    assert lines[-1] == "4 FAIL, 5 SKIP, 70 PASS"
    assert "and 21 more" in lines[-2]
    assert max(map(len, lines)) <= 150
