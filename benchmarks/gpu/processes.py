"""Processes of cases: forked from one that has imported everything, or started afresh.

A fault or a hang of a GPU kills the process that met it. So every case has processes of its own,
which are killed with all that they started when their time is over. A process that was forked may
use CUDA if its parent never has: `can_fork` finds out.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.gpu.case import Case, CaseSkippedError, Status

ROOT = Path(__file__).resolve().parents[2]
_POLL_S = 0.02
_TAIL = 1500


@dataclass(frozen=True)
class Job:
    """A call of a function that a module has under its name.

    Args:
        function: called with the arguments; what it returns is an exit code or None.
        arguments: by name; what pickle takes.
    """

    function: Callable[..., int | None]
    arguments: Mapping[str, Any]


@dataclass
class Process:
    """A process and all that it starts; the leader of a session of its own."""

    pid: int
    code: int | None = None

    child: subprocess.Popen[bytes] | None = None
    """What it was started by: without it, `subprocess` would wait for the process by itself."""
    _is_reaped: bool = False

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None:
            # left to be waited for: its number would be given to another process
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                by_itself = ended.si_code == os.CLD_EXITED
                self.code = ended.si_status if by_itself else -ended.si_status
        return self.code

    def kill(self) -> None:
        """End it, and what it started, also after its own end."""
        if self._is_reaped:
            return
        for kill in (os.kill, os.killpg):  # it may lead no group yet
            with suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self._is_reaped = True
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(status)
        if self.child is not None:
            self.child.returncode = self.code


def start(job: Job, environment: Mapping[str, str], output: Path, fork: bool) -> Process:
    """Start a process.

    Args:
        job: what it does.
        environment: variables beside those of this process.
        output: file to which its output is appended.
        fork: rather than start an interpreter, which imports everything once more.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if fork:
        pid = os.fork()
        if pid == 0:
            os.environ.update(environment)
            _become(job, output)
        return Process(pid)
    text = base64.b64encode(pickle.dumps(job)).decode()
    with output.open("ab") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.processes", text],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": _path()} | dict(environment),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Process(child.pid, child=child)


def _path() -> str:
    given = os.environ.get("PYTHONPATH", "")
    return f"{ROOT}{os.pathsep}{given}" if given else str(ROOT)


def _become(job: Job, output: Path) -> NoReturn:
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    _perform(job)


def _perform(job: Job) -> NoReturn:
    """Do the job and leave at once: a device may hang in what an interpreter does at its end."""
    try:
        code = job.function(**job.arguments) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(processes: Sequence[Process], until: float) -> bool:
    """Wait for all of them, at most until a moment of the monotonic clock; whether all ended."""
    while any([process.poll() is None for process in processes]):
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_S)
    return True


def group_environment(ranks: int) -> list[dict[str, str]]:
    """The variables of each rank of a fresh group on this machine; all share its first device."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Args:
        status: PASS, FAIL or SKIP.
        seconds: that it took.
        figures: what it found.
        message: why it failed or was skipped; one line.
        detail: the end of its output, where it failed.
    """

    status: Status
    seconds: float
    figures: dict[str, Any]
    message: str = ""
    detail: str = ""


class Running:
    """A case in its processes.

    Args:
        case: what runs.
        device: ``cuda`` or ``cpu``.
        tiny: the size.
        folder: for its output and its files.
        fork: how processes are started.
    """

    def __init__(self, case: Case, device: str, tiny: bool, folder: Path, fork: bool) -> None:
        self.case, self._started = case, time.monotonic()
        stem = case.label.replace("/", "_").replace(" ", "_")
        self._output = folder / f"{stem}.log"
        self._output.write_text("")
        ranks = max(1, case.ranks)
        self._results = [folder / f"{stem}.{rank}.json" for rank in range(ranks)]
        places = group_environment(ranks) if case.ranks else [{}]
        self._processes = []
        for place, result in zip(places, self._results, strict=True):
            result.unlink(missing_ok=True)
            work = {"case": case, "device": device, "tiny": tiny, "result": str(result)}
            environment = {**case.environment, **place, "RELORA_REPORT_FORK": str(int(fork))}
            job = Job(perform, work)
            self._processes.append(start(job, environment, self._output, fork))

    def ended(self, now: float) -> Outcome | None:
        """The outcome once there is one; kills what is late, or waits for a rank that failed."""
        seconds = now - self._started
        codes = [process.poll() for process in self._processes]
        if None in codes and seconds < self.case.limit_s and not any(codes):
            return None
        for process in self._processes:
            process.kill()
        return self._outcome(codes, seconds)

    def kill(self) -> None:
        """End it at once."""
        for process in self._processes:
            process.kill()

    def _outcome(self, codes: Sequence[int | None], seconds: float) -> Outcome:
        found = [json.loads(p.read_text()) for p in self._results if p.exists()]
        for status in ("SKIP", "FAIL"):
            for result in found:
                if result["status"] == status:
                    return Outcome(status, seconds, {}, result["message"], self._tail(status))
        if all(code == 0 for code in codes) and len(found) == len(codes):
            return Outcome("PASS", seconds, found[0]["figures"])
        ends = [f"rank {rank}: {_end(code)}" for rank, code in enumerate(codes) if code != 0]
        return Outcome("FAIL", seconds, {}, "; ".join(ends), self._tail("FAIL"))

    def _tail(self, status: str) -> str:
        return "" if status == "SKIP" else self._output.read_text(errors="replace")[-_TAIL:]


def _end(code: int | None) -> str:
    if code is None:
        return "killed, its time was over"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def perform(case: Case, device: str, tiny: bool, result: str) -> int:
    """Run a case in this process and leave its result, written in one step, in a file."""
    from benchmarks.gpu.case import Sizes

    answer: dict[str, Any] = {"status": "PASS", "figures": {}, "message": ""}
    try:
        where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
        if device == "cuda" and case.ranks:
            torch.cuda.set_device(0)
        answer["figures"] = case.function(where, Sizes(tiny), **case.arguments)
    except CaseSkippedError as reason:
        answer |= {"status": "SKIP", "message": str(reason)}
    except BaseException as error:
        traceback.print_exc()
        said = (str(error).strip() or repr(error)).splitlines()[0]
        answer |= {"status": "FAIL", "message": f"{type(error).__name__}: {said}"}
    part = Path(result).with_suffix(".part")
    part.write_text(json.dumps(answer))
    part.rename(result)
    return 1 if answer["status"] == "FAIL" else 0


def touch_cuda() -> int:
    """Use the GPU in this process."""
    return 0 if float(torch.ones(2, device="cuda").sum()) == 2.0 else 1


def can_fork(device: str, folder: Path) -> bool:
    """Whether a process forked from this one can use the device: no library has touched it yet."""
    if device == "cpu":
        return True
    probe = start(Job(touch_cuda, {}), {}, folder / "fork.log", fork=True)
    ended = wait([probe], time.monotonic() + 60)
    probe.kill()
    return ended and probe.code == 0


if __name__ == "__main__":
    from benchmarks.gpu import processes

    # the job's functions belong to the module by its name, not to `__main__`
    processes._perform(pickle.loads(base64.b64decode(sys.argv[1])))
