"""Ctrl-C under every launcher: saved, nothing left running, and a code that says so.

A terminal sends SIGINT to every process of the group in the foreground. The project lies in a
folder whose name has a blank, and so do the run file and the results.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness.ranks import ROOT, free_port, rank_environment
from tests.harness.run import metrics, write_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

_GONE_S = 60.0
"""By when no process of a job may be left: the launchers themselves wait for ranks up to 30 s."""
_IMPATIENCE_S = 6.0
"""After which a second request is one of its own; see `StopRequests`."""
_RANK = "launch/pretrain.py"
LAUNCHES = {
    "python": [sys.executable, "-u", _RANK],
    "torchrun": ["torchrun", "--nproc_per_node=2", _RANK],
    "deepspeed": ["deepspeed", "--num_gpus=2", _RANK],
    "single_node.sh": ["bash", "launch/single_node.sh"],
}
OURS = ("python", "single_node.sh")
"""Those whose exit code is the ranks': the others have codes of their own, not 0."""

# the last write of a save takes this long, so that somebody can press a key meanwhile
_SLOW = """
    import contextlib, os, pathlib, time
    from relora_ds import activity

    def slowly(what, doing=activity.doing):
        @contextlib.contextmanager
        def block():
            with doing(what):
                if what == "save: manifest":
                    pathlib.Path(os.environ["SAVING"]).touch()
                    time.sleep(float(os.environ["SAVING_S"]))
                yield
        return block()

    activity.doing = slowly
"""


class Job:
    """A run under a launcher, in a group of its own, as a shell with a terminal starts one."""

    def __init__(self, run: dict[str, Any], place: Path, launcher: str, saving_s: float) -> None:
        self.output = place / "output.txt"
        self.results = place / "the results"
        self.saving = place / "saving"
        project = place / "a project"
        for folder in ("launch", "relora_ds"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / folder, project / folder, ignore=ignored)
        script = project / _RANK
        text = script.read_text()
        begin = "    from relora_ds.train.lifetime.lifetime"
        assert text.count(begin) == 1
        script.write_text(text.replace(begin, _SLOW + begin))
        run = {**run, "output_dir": str(self.results)}
        run["train"] = {**run["train"], "steps": 50000}
        run["eval"] = {"every": 0, "batches": 1}
        self.description = write_run(run, place / "the run.yaml")
        command = [*LAUNCHES[launcher], str(self.description)]
        if launcher in ("torchrun", "deepspeed"):
            command.insert(1, f"--master_port={free_port()}")
        environment = rank_environment() | {
            "PROCESSES": "2", "MASTER_PORT": str(free_port()), "VENV": "none",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SAVING": str(self.saving), "SAVING_S": str(saving_s),
        }  # fmt: skip
        environment["PYTHONPATH"] = str(project)
        self.count = 1 if launcher == "python" else 2
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=project, env=environment, stdout=file, stderr=file,
                # whoever runs the tests may have switched it off
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                start_new_session=True,
            )  # fmt: skip

    def press_ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def wait_for(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not reached():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, f"never reached: {self.output.read_text()}"
            time.sleep(0.2)

    def trains(self) -> bool:
        return (self.results / "metrics.jsonl").is_file() and len(metrics(self.results)) > 3

    def ranks_are_there(self) -> bool:
        return len([line for line in self.left() if "-u" in line and _RANK in line]) >= self.count

    def left(self) -> list[list[str]]:
        """Command lines of live processes of the job, its script and what that started apart."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = process.info["cmdline"] or []
            if process.info["status"] != psutil.STATUS_ZOMBIE and str(self.description) in line:
                found.append(line)
        return found

    def ends(self) -> int:
        """Wait until nothing is left; returns the exit code of what the user started."""
        deadline = time.monotonic() + _GONE_S
        code = self.process.wait(timeout=_GONE_S)
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert self.left() == [], self.output.read_text()
        return code

    def said(self) -> str:
        return self.output.read_text()

    def saved(self) -> int | None:
        """The step that `latest` names."""
        latest = self.results / "checkpoints" / "latest"
        return int(latest.read_text().removeprefix("step_")) if latest.is_file() else None


@pytest.fixture
def started() -> Iterator[list[Job]]:
    jobs: list[Job] = []
    yield jobs
    for job in jobs:
        if job.process.poll() is None:
            for process in psutil.Process(job.process.pid).children(recursive=True):
                process.kill()
            job.process.kill()
            job.process.wait()


def check_code(job: Job, launcher: str, code: int) -> None:
    assert code == 75 if launcher in OURS else code != 0, job.said()
    assert "ROOT CAUSE" not in job.said(), job.said()


@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize("launcher", LAUNCHES)
def test_while_training(
    tiny_run: dict[str, Any], tmp_path: Path, started: list[Job], launcher: str, presses: int
) -> None:
    """A second key that follows closely is the same request."""
    tiny_run["checkpoint"] = {"every": 0}
    started.append(job := Job(tiny_run, tmp_path, launcher, saving_s=2.0))
    job.wait_for(job.trains)
    for _ in range(presses):
        job.press_ctrl_c()
        time.sleep(0.5)
    check_code(job, launcher, job.ends())
    assert job.saved() == max(metrics(job.results)), job.said()
    assert "(exit code 75)" in job.said()


@pytest.mark.parametrize("launcher", LAUNCHES)
def test_before_training(
    tiny_run: dict[str, Any], tmp_path: Path, started: list[Job], launcher: str
) -> None:
    started.append(job := Job(tiny_run, tmp_path, launcher, saving_s=0.0))
    job.wait_for(job.ranks_are_there)
    time.sleep(1.0)  # within seconds of imports
    job.press_ctrl_c()
    check_code(job, launcher, job.ends())
    assert job.saved() is None


@pytest.mark.parametrize("launcher", LAUNCHES)
def test_while_saving(
    tiny_run: dict[str, Any], tmp_path: Path, started: list[Job], launcher: str
) -> None:
    """The save is finished, and the step after it is saved as well."""
    tiny_run["checkpoint"] = {"every": 5}
    started.append(job := Job(tiny_run, tmp_path, launcher, saving_s=2.0))
    job.wait_for(job.saving.exists)
    job.press_ctrl_c()
    check_code(job, launcher, job.ends())
    assert job.saved() is not None
    assert job.saved() == max(metrics(job.results)), job.said()


# the deepspeed command has ended by then, and its launch.py kills ranks after 30 s by itself
@pytest.mark.parametrize("launcher", [name for name in LAUNCHES if name != "deepspeed"])
def test_while_a_long_save_keeps_somebody_waiting(
    tiny_run: dict[str, Any], tmp_path: Path, started: list[Job], launcher: str
) -> None:
    """Who presses again much later does not want to wait for it: nothing of it is left."""
    tiny_run["checkpoint"] = {"every": 5}
    started.append(job := Job(tiny_run, tmp_path, launcher, saving_s=20.0))
    job.wait_for(job.saving.exists)
    job.press_ctrl_c()
    time.sleep(_IMPATIENCE_S)
    job.press_ctrl_c()
    check_code(job, launcher, job.ends())
    assert job.saved() is None, "the first save was never finished"
