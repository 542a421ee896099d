"""Runs cases within a budget, writes each outcome down at once, and prints a short table."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from benchmarks.gpu.case import Case
from benchmarks.gpu.cases.catalogue import STAGES, cases_of
from benchmarks.gpu.imports import import_everything
from benchmarks.gpu.machine import describe
from benchmarks.gpu.processes import Outcome, Running, can_fork

_LINES = 60
_WIDTH = 150
_POLL_S = 0.02


def run_report(verb: str, device: str, tiny: bool, budget_s: float, out: Path) -> int:
    """Run the cases of a verb.

    Args:
        verb: ``checks``, ``speed`` or ``all``.
        device: ``cuda`` or ``cpu``.
        tiny: small sizes.
        budget_s: seconds for all of it.
        out: folder of `report.jsonl` and `logs`.

    Returns:
        0, or 1 if a case failed.
    """
    ends = time.monotonic() + budget_s
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    import_everything()
    fork = can_fork(device, logs)
    machine = describe(device)
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value))
    if not fork:
        print("a library uses CUDA when it is imported: every case starts an interpreter")
    runner = _Runner(device, tiny, ends, logs, fork)
    results: list[tuple[Case, Outcome]] = []
    with (out / "report.jsonl").open("a") as file:
        for case, outcome in runner.run(_ordered(cases_of(verb, tiny)), budget_s):
            results.append((case, outcome))
            _write(file, case, outcome, describe(device))
    for line in table(results):
        print(line)
    return int(any(outcome.status == "FAIL" for _, outcome in results))


def _ordered(cases: Sequence[Case]) -> list[Case]:
    """The most valuable seconds first; what must run alone before what may run side by side."""
    return sorted(cases, key=lambda case: (not case.alone, -case.value / case.expected_s))


class _Runner:
    def __init__(self, device: str, tiny: bool, ends: float, logs: Path, fork: bool) -> None:
        self._device, self._tiny, self._ends = device, tiny, ends
        self._logs, self._fork = logs, fork
        self._width = min(2, os.cpu_count() or 1)

    def run(self, cases: Sequence[Case], budget_s: float) -> Iterator[tuple[Case, Outcome]]:
        """Outcomes as they come."""
        left = {stage: STAGES[stage].share * budget_s for stage in STAGES}
        waiting, running = list(cases), list[Running]()
        try:
            while waiting or running:
                if waiting and self._may_start(waiting[0], running):
                    case = waiting.pop(0)
                    reason = self._too_late(case, left[case.stage])
                    if reason:
                        yield case, Outcome("SKIP", 0.0, {}, reason)
                        continue
                    left[case.stage] -= case.expected_s
                    running.append(self._start(case))
                now = time.monotonic()
                for each in list(running):
                    outcome = each.ended(now)
                    if outcome is not None:
                        running.remove(each)
                        # give back what it did not take, or charge what it took too long
                        left[each.case.stage] += each.case.expected_s - outcome.seconds
                        yield each.case, outcome
                time.sleep(_POLL_S)
        finally:
            for each in running:
                each.kill()

    def _may_start(self, case: Case, running: Sequence[Running]) -> bool:
        if self._tiny:  # no figure means anything that others could spoil
            return len(running) < self._width
        if any(each.case.alone for each in running) or (case.alone and running):
            return False
        return len(running) < self._width

    def _too_late(self, case: Case, left_s: float) -> str:
        """Why a case is not started; on a CPU no case takes what it takes on a GPU."""
        rest = self._ends - time.monotonic()
        if rest <= (0 if self._tiny else case.expected_s):
            return "no time left: give a larger --budget"
        if not self._tiny and left_s < case.expected_s:
            return f"the time of stage {case.stage} is used up: give a larger --budget"
        return ""

    def _start(self, case: Case) -> Running:
        return Running(case, self._device, self._tiny, self._logs, self._fork)


def _write(file: IO[str], case: Case, outcome: Outcome, machine: dict[str, str | None]) -> None:
    line = {"stage": case.stage, "case": case.name} | asdict(outcome) | machine
    file.write(json.dumps(line) + "\n")
    file.flush()
    os.fsync(file.fileno())


def table(results: Sequence[tuple[Case, Outcome]]) -> list[str]:
    """At most 60 lines: failures, then what was skipped, then what passed, then the count."""
    order = {"FAIL": 0, "SKIP": 1, "PASS": 2}
    ranked = sorted(results, key=lambda pair: (order[pair[1].status], pair[0].label))
    lines = [_line(case, outcome) for case, outcome in ranked]
    counts = {status: sum(o.status == status for _, o in results) for status in order}
    if len(lines) > _LINES - 1:
        hidden = len(lines) - (_LINES - 2)
        lines = [*lines[: _LINES - 2], f"... and {hidden} more, see report.jsonl"]
    return [*lines, ", ".join(f"{count} {status}" for status, count in counts.items())]


def _line(case: Case, outcome: Outcome) -> str:
    said = outcome.message or ", ".join(
        f"{name} {_short(value)}"
        for name, value in outcome.figures.items()
        if isinstance(value, int | float | str)
    )
    text = f"{outcome.status} {case.label:<34} {outcome.seconds:6.1f} s  {said}"
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
