"""A fault strikes its own job: no test runner, no reaper, no later process of an old number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu.processes import Job, start
from tests.harness.ranks import ROOT
from tests.harness.victims import Family

_LAUNCHER = """
import os, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
rank.wait()
"""
_RANK = """
import os, sys, time
from pathlib import Path
from tests.harness.victims import Family
place, starter = Path(sys.argv[1]), int(sys.argv[2])
family = Family.of_this_process(starter)
(place / "armed").write_text(str(len(family.launchers)))
while not (place / "strike").exists():
    time.sleep(0.01)
try:
    {strike}
except (RuntimeError, ProcessLookupError) as error:
    (place / "refused").write_text(str(error))
(place / "struck").touch()
"""


def _wait_for(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _job(place: Path, strike: str) -> subprocess.Popen[bytes]:
    """A launcher in a session of its own, and a rank below it that strikes when it is told."""
    command = [sys.executable, "-c", _LAUNCHER, _RANK.replace("{strike}", strike)]
    command += [str(place), str(os.getsid(0))]
    job = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    _wait_for(lambda: (place / "armed").exists() and (place / "armed").read_text() != "")
    return job


@pytest.mark.parametrize("strike", ["family.kill_launcher(1)", "family.kill_all()"])
def test_the_launcher_is_struck(tmp_path: Path, strike: str) -> None:
    with _job(tmp_path, strike) as job:
        assert (tmp_path / "armed").read_text() == "1", "nothing above the session counts"
        (tmp_path / "strike").touch()
        assert job.wait(30) == -signal.SIGKILL
    if "launcher" in strike:
        _wait_for((tmp_path / "struck").exists)
        assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("strike", ["family.kill_launcher(1)", "family.kill_launcher(2)"])
def test_a_launcher_that_is_gone_is_not_replaced_by_whoever_reaps_its_rank(
    tmp_path: Path, strike: str
) -> None:
    with _job(tmp_path, strike) as job:
        job.kill()
    (tmp_path / "strike").touch()
    _wait_for((tmp_path / "struck").exists)
    assert (tmp_path / "refused").exists()


def test_faults_are_refused_in_the_session_of_the_tests() -> None:
    with pytest.raises(RuntimeError, match="a session of their own"):
        Family.of_this_process(os.getsid(0))


def test_a_group_that_is_not_the_jobs_is_refused() -> None:
    family = Family(os.getsid(0) + 1, ())
    with pytest.raises(RuntimeError, match="is not that of job"):
        family.kill_all()


@pytest.mark.parametrize("fork", [True, False])
def test_the_number_of_a_case_stays_its_own_until_it_is_killed(tmp_path: Path, fork: bool) -> None:
    """As long as nobody has waited for it, the system gives its number to no other process."""
    process = start(Job(os._exit, {"status": 3}), {}, tmp_path / "output", fork)
    _wait_for(lambda: process.poll() is not None)
    subprocess.run(["true"], check=True)  # which waits for what nobody holds
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    process.kill()
    assert process.code == 3
    assert not psutil.pid_exists(process.pid)
    process.kill()  # signals nobody
