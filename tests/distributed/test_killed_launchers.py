"""A launcher that is killed takes its ranks along; those that train save a checkpoint first."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness.ranks import ROOT, free_port, rank_environment
from tests.harness.run import metrics, write_run

pytestmark = pytest.mark.slow

_GONE_S = 35.0
"""By when no process of a job may be left."""
_RANK = "launch/pretrain.py"

LAUNCHES = {
    "single_node.sh": ["bash", "launch/single_node.sh"],
    "deepspeed": ["deepspeed", _RANK],
    "launch.py": ["deepspeed", _RANK],
    "torchrun": ["torchrun", "--nproc_per_node=2", _RANK],
}
"""How a run is started, by what is killed."""
_LAUNCH_PY = "deepspeed.launcher.launch"
"""What names the process that the deepspeed command starts, and that starts the ranks."""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
@pytest.mark.parametrize("when", ["import", "train"])
@pytest.mark.parametrize("killed", LAUNCHES)
def test_no_process_outlives_its_launcher(
    tiny_run: dict[str, Any], tmp_path: Path, killed: str, when: str, how: signal.Signals
) -> None:
    tiny_run["train"]["steps"] = 50000
    tiny_run["checkpoint"] = {"every": 0}
    tiny_run["eval"] = {"every": 0, "batches": 1}
    description = write_run(tiny_run, tmp_path / "run.yaml")
    output = tmp_path / "output.txt"
    command = [*LAUNCHES[killed], str(description)]
    if command[0] == "deepspeed":
        command[1:1] = ["--num_gpus=2", f"--master_port={free_port()}"]
    if command[0] == "torchrun":
        command[1:1] = [f"--master_port={free_port()}"]
    environment = rank_environment() | {"PROCESSES": "2", "MASTER_PORT": str(free_port())}
    with output.open("w") as file:
        job = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    run = Path(tiny_run["output_dir"])
    _wait(lambda: len(_ranks(description)) == 2, job, output)
    if when == "train":
        _wait(lambda: (run / "metrics.jsonl").is_file() and len(metrics(run)) > 3, job, output)
    target = psutil.Process(job.pid)
    if killed == "launch.py":
        target = _processes(description, _LAUNCH_PY)[0]
    target.send_signal(how)
    deadline = time.monotonic() + _GONE_S
    while _left(description, job.pid) and time.monotonic() < deadline:
        job.poll()
        time.sleep(0.2)
    assert _left(description, job.pid) == [], output.read_text()
    code = job.wait(timeout=1)
    if killed == "single_node.sh" and how == signal.SIGTERM:
        assert code == 75, output.read_text()
    if killed != "launch.py":  # the deepspeed command does not look at how launch.py ended
        assert code != 0, output.read_text()
    if when == "train":
        saved = (run / "checkpoints" / "latest").read_text()
        assert saved == f"step_{max(metrics(run))}", output.read_text()


def _wait(reached: Callable[[], bool], job: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + 240
    while not reached():
        assert job.poll() is None, output.read_text()
        assert time.monotonic() < deadline, f"the run did not start: {output.read_text()}"
        time.sleep(0.1)


def _processes(description: Path, *words: str) -> list[psutil.Process]:
    """Live processes of the job whose command line has all words."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        is_live = process.info["status"] != psutil.STATUS_ZOMBIE
        if is_live and str(description) in line and all(word in line for word in words):
            found.append(process)
    return found


def _ranks(description: Path) -> list[psutil.Process]:
    launchers = {process.pid for process in _processes(description, _LAUNCH_PY)}
    found = _processes(description, _RANK, "-u")
    return [process for process in found if process.pid not in launchers]


def _left(description: Path, script: int) -> list[str]:
    """What is left of a job, with the helpers of its script, which know it by its launch id."""
    found = [" ".join(process.info["cmdline"]) for process in _processes(description)]
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if process.info["status"] != psutil.STATUS_ZOMBIE and f"-{script}-" in line:
            found.append(line)
    return found
