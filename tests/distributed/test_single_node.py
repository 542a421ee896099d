"""`launch/single_node.sh` does what the launcher under it does not: stop in order, leave nobody.

The project, the run file and the output lie in folders whose names have blanks.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness.ranks import ROOT, free_port, rank_environment
from tests.harness.run import metrics, write_run

pytestmark = pytest.mark.distributed


def test_sigterm_and_a_killed_launcher_save_and_leave_no_rank(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    project = tmp_path / "a project"
    for folder in ("launch", "relora_ds"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, project / folder, ignore=ignored)
    tiny_run["output_dir"] = str(tmp_path / "the results")
    tiny_run["train"]["steps"] = 5000
    tiny_run["checkpoint"] = {"every": 0}
    tiny_run["eval"] = {"every": 0, "batches": 1}
    description = write_run(tiny_run, tmp_path / "the run.yaml")
    script = _start(project, description)
    _wait_for_step(script, tiny_run, 5)
    script.send_signal(signal.SIGTERM)
    output, _ = script.communicate(timeout=120)
    assert script.returncode == 75, output
    assert _ranks(description) == []
    stopped_at = _saved(tiny_run)

    script = _start(project, description)
    _wait_for_step(script, tiny_run, stopped_at + 5)
    for launcher in _processes("deepspeed.launcher.launch", description):
        launcher.kill()  # the deepspeed command returns 0 now
    output, _ = script.communicate(timeout=120)
    assert script.returncode == 1, output
    assert _ranks(description) == []
    assert _saved(tiny_run) > stopped_at

    tiny_run["method"]["rnak"] = 8
    script = _start(project, write_run(tiny_run, tmp_path / "wrong.yaml"))
    output, _ = script.communicate(timeout=120)
    assert script.returncode == 2, output


def _start(project: Path, description: Path) -> subprocess.Popen[str]:
    environment = rank_environment() | {"PROCESSES": "2", "MASTER_PORT": str(free_port())}
    # as this interpreter is, and with the copy's package alone
    environment |= {"VENV": "none", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    return subprocess.Popen(
        ["bash", str(project / "launch" / "single_node.sh"), str(description)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _wait_for_step(script: subprocess.Popen[str], run: dict[str, Any], step: int) -> None:
    output_dir, deadline = Path(run["output_dir"]), time.monotonic() + 240
    while not (output_dir / "metrics.jsonl").is_file() or step > max(metrics(output_dir) or [0]):
        assert script.poll() is None, script.communicate()[0]
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.2)


def _saved(run: dict[str, Any]) -> int:
    """The step of the last checkpoint, which is the last one that was trained."""
    output_dir = Path(run["output_dir"])
    last = max(metrics(output_dir))
    assert (output_dir / "checkpoints" / "latest").read_text() == f"step_{last}"
    return last


def _ranks(description: Path) -> list[psutil.Process]:
    return _processes("launch/pretrain.py", description)


def _processes(program: str, description: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if program in line and str(description) in line:
            found.append(process)
    return found
