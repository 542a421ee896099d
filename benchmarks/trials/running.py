"""Runs of a court, each in processes of its own, as many at a time as are asked for.

A run that is interrupted saves a checkpoint, and goes on from it when the court is held again: the
program that trains sees to that. Finished runs are recorded before anything else happens.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.trials.description import Court
from benchmarks.trials.findings import find_record
from benchmarks.trials.ledger import Ledger, Trial
from benchmarks.trials.rule import to_do
from relora_ds.checkpoint.format.layout import CHECKPOINTS
from relora_ds.errors import DivergenceError, PreemptedError

_ROOT = Path(__file__).resolve().parents[2]
_GRACE = 300.0
"""Seconds that interrupted runs have to save."""
_POLL = 0.25
_PR_SET_PDEATHSIG = 1

Command = Callable[[Court, Trial], Sequence[str]]
"""What starts a run."""


class Watcher(Protocol):
    """Whoever shows how a court proceeds."""

    def started(self, trial: Trial) -> None:
        """A run begins, or goes on."""
        ...

    def ended(self, trial: Trial, outcome: str) -> None:
        """A run is over for now."""
        ...

    def tick(self) -> None:
        """Some time has passed."""
        ...


def run_directory(court: Court, trial: Trial) -> Path:
    """Where a run keeps what it writes."""
    return court.directory / trial.place


def training_command(court: Court, trial: Trial) -> list[str]:
    """The command of a run of this program."""
    key = court.contestant(trial.contestant).rate_key
    launcher = [sys.executable]
    if (processes := court.config.processes) > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return [
        *launcher,
        str(_ROOT / "launch/pretrain.py"),
        *court.arguments(trial.contestant),
        f"output_dir={run_directory(court, trial)}",
        f"train.seed={trial.seed}",
        f"{key}={trial.rate:g}",
    ]


@dataclass
class _Running:
    """A run that is under way."""

    trial: Trial
    process: subprocess.Popen[bytes]
    spent: Path
    log: Path
    begun: float = field(default_factory=time.monotonic)

    def ended(self) -> int | None:
        """The exit code once all of it is over, and its time is written down."""
        found, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not found:
            return None
        self.process.returncode = os.waitstatus_to_exitcode(status)
        cpu, wall = usage.ru_utime + usage.ru_stime, time.monotonic() - self.begun
        _add_line(self.spent, {"cpu_seconds": cpu, "wall_seconds": wall})
        return self.process.returncode


class Runner:
    """Holds a court.

    Args:
        court: its description.
        ledger: finished runs, which are not repeated.
        jobs: runs at a time.
        watcher: is told what happens.
        command: starts a run.
    """

    def __init__(
        self,
        court: Court,
        ledger: Ledger,
        jobs: int,
        watcher: Watcher,
        command: Command = training_command,
    ) -> None:
        self._court, self._ledger, self._jobs = court, ledger, jobs
        self._watcher, self._command = watcher, command
        self._running: dict[Trial, _Running] = {}
        self.failed: dict[str, str] = {}
        """By contestant: how one of its runs failed. No more of its runs are started."""
        self._stop = False

    def hold(self, seconds: float | None = None) -> bool:
        """Run what is to do, until it is done or the time is over.

        Returns:
            Whether everything that did not fail is finished.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        with _interruptible(self._interrupt):
            while not self._is_over(deadline):
                self._start_more()
                if not self._running:
                    break
                time.sleep(_POLL)
                self._collect()
                self._watcher.tick()
            finished = not self._running and not self._stop
            self._wind_up()
        return finished

    def _is_over(self, deadline: float | None) -> bool:
        return self._stop or (deadline is not None and time.monotonic() >= deadline)

    def _interrupt(self) -> None:
        self._stop = True

    def _start_more(self) -> None:
        for contestant in self._court.contestants:
            for trial in to_do(self._court.config, contestant, self._ledger):
                if len(self._running) >= self._jobs:
                    return
                # which need not be this contestant's: its rate may be another one's
                if trial not in self._running and trial.contestant not in self.failed:
                    self._start(trial)

    def _start(self, trial: Trial) -> None:
        logs = self._court.directory / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        name = "_".join(trial.place.parts)
        spent = logs / f"{name}.spent"
        if not run_directory(self._court, trial).exists():
            spent.unlink(missing_ok=True)  # of a run that is gone
        _add_line(spent, {})
        log = logs / f"{name}.log"
        threads = max(1, (os.cpu_count() or 1) // (self._jobs * self._court.config.processes))
        with open(log, "ab") as output:
            process = subprocess.Popen(
                self._command(self._court, trial),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(threads), **os.environ},
                start_new_session=True,  # an interrupt from the keyboard is the court's to pass on
                preexec_fn=_end_with_parent,
            )
        self._running[trial] = _Running(trial, process, spent, log)
        self._watcher.started(trial)

    def _collect(self) -> None:
        for trial, running in list(self._running.items()):
            if (code := running.ended()) is None:
                continue
            del self._running[trial]
            self._watcher.ended(trial, self._take(running, code))

    def _take(self, running: _Running, code: int) -> str:
        """Record a run that has ended with an exit code; returns what became of it."""
        trial = running.trial
        if code == PreemptedError.exit_code:
            return "interrupted"
        if code not in (0, DivergenceError.exit_code):
            self.failed[trial.contestant] = f"{trial}: exit code {code}, see {running.log}"
            return f"failed with exit code {code}"
        directory = run_directory(self._court, trial)
        setting = self._court.settings[trial.contestant]
        record = find_record(directory, trial, setting, _spent(running.spent), diverged=code != 0)
        self._ledger.add(record)
        if not self._court.config.keep_checkpoints:
            shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
        if record.perplexity is None:
            return "diverged"
        return f"perplexity {record.perplexity:.2f}"

    def _wind_up(self) -> None:
        """Interrupt what is running, and wait until it has saved."""
        for running in self._running.values():
            os.killpg(running.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        while self._running and time.monotonic() < deadline:
            time.sleep(_POLL)
            self._collect()
            self._watcher.tick()
        for running in self._running.values():
            os.killpg(running.process.pid, signal.SIGKILL)
        for trial in list(self._running):
            self._running.pop(trial).process.wait()
            self._watcher.ended(trial, "killed")


def _end_with_parent() -> None:
    """Have this process asked to stop when the one that started it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _add_line(path: Path, line: dict[str, float]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def _spent(path: Path) -> dict[str, float] | None:
    """Time of all parts of a run; None where a part ended without a word."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    parts = [line for line in lines if line]
    if 2 * len(parts) != len(lines):
        return None
    return {key: sum(part[key] for part in parts) for key in ("cpu_seconds", "wall_seconds")}


@contextmanager
def _interruptible(interrupt: Callable[[], None]) -> Iterator[None]:
    """Inside, a request to stop is noted instead of obeyed at once."""
    requests = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: interrupt()) for number in requests]
    try:
        yield
    finally:
        for number, handler in zip(requests, before, strict=True):
            signal.signal(number, handler)
