"""Runs that are killed: started below a launcher, watched until nothing of them is left."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.harness.faults import Fault, plan, struck
from tests.harness.ranks import meeting_point, place, rank_environment, warm_process
from tests.harness.warm import Launcher, Script, Start

GONE_S = 35.0
"""How long processes of a job may outlive the first of them that ended."""

_RANKS = 2
_ARMED = "tests/faults/armed.py"


@dataclass(frozen=True)
class End:
    """How a job ended.

    Args:
        code: exit code of its launcher; negative for a signal.
        said: what all its processes printed.
        struck: names of the moments at which faults struck.
        outlived_s: how long the last process was there after the launcher had ended.
    """

    code: int
    said: str
    struck: list[str]
    outlived_s: float


@dataclass
class Job:
    """A run of several ranks below a launcher, all of them forked, in a session of their own.

    Args:
        launcher: process id, which is also that of the session.
        folder: where faults and output are.
    """

    launcher: int
    folder: Path
    started: float = field(default_factory=time.monotonic)
    _over: bool = field(default=False, init=False)
    """Whether nothing of it is left: its id may be another session's from then on."""

    def processes(self) -> list[psutil.Process]:
        """What is alive of the job, the launcher first."""
        return [] if self._over else session(self.launcher)

    def finish(self, timeout_s: float = 120.0) -> End:
        """Wait for the launcher to end, and then for everything else.

        Raises:
            AssertionError: it does not end, or leaves processes behind for longer than is allowed.
        """
        warm, deadline = warm_process(), self.started + timeout_s
        while (code := warm.codes([self.launcher])[0]) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"not over after {timeout_s:g} s\n{self.said()}")
            time.sleep(0.01)
        outlived = wait_until_gone(self.launcher, self.said)
        self._over = True
        return End(code, self.said(), struck(self.folder), outlived)

    def said(self) -> str:
        """What its processes printed so far."""
        return (self.folder / "output.txt").read_text()

    def kill(self) -> None:
        """End it, whatever it does."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()


def start_job(arguments: Sequence[str], faults: Sequence[Fault], **environment: str) -> Job:
    """Start `launch/pretrain.py` on two ranks below a launcher.

    Args:
        arguments: of the script.
        faults: what is to happen.
        environment: variables beside those that ranks have anyway, or instead of them.
    """
    shared = meeting_point() | environment
    places = [shared | place(rank, _RANKS) for rank in range(_RANKS)]
    return _start("launch/pretrain.py", arguments, faults, places)


def run_job(arguments: Sequence[str], *faults: Fault, **environment: str) -> End:
    """Start a job as `start_job` does and wait for its end."""
    return start_job(arguments, faults, **environment).finish()


def run_tool(script: str, arguments: Sequence[str], *faults: Fault) -> End:
    """Run another script of the project in one process below a launcher, and wait for its end."""
    return _start(script, arguments, faults, [{}]).finish()


def _start(
    script: str,
    arguments: Sequence[str],
    faults: Sequence[Fault],
    places: Sequence[Mapping[str, str]],
) -> Job:
    """Start a script on a process for each of the places that are described to them."""
    folder = Path(tempfile.mkdtemp(prefix="job_"))
    output = str(folder / "output.txt")
    own = rank_environment() | plan(folder, faults)
    armed = Script(_ARMED, (script, *arguments))
    starts = [Start(armed, own | dict(place), output) for place in places]
    launcher = Start(Launcher(tuple(starts)), own, output)
    return Job(warm_process().start([launcher])[0], folder)


def session(leader: int) -> list[psutil.Process]:
    """Processes of a session that are alive, by id."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            same = os.getsid(process.pid) == leader
        except ProcessLookupError:
            continue
        if same and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return sorted(found, key=lambda process: process.pid)


def wait_until_gone(leader: int, said: Callable[[], str]) -> float:
    """Seconds until nothing of a session is alive.

    Args:
        leader: of the session.
        said: what its processes printed, for the message.

    Raises:
        AssertionError: something is after `GONE_S`; it is killed.
    """
    begun = time.monotonic()
    while alive := session(leader):
        if time.monotonic() > begun + GONE_S:
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            raise AssertionError(f"alive after {GONE_S:g} s: {alive}\n{said()}")
        time.sleep(0.05)
    return time.monotonic() - begun
