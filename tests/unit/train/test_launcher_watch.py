"""A rank notices the end of its launcher, whether or not it prints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# prints nothing: the answer is the name of a file
_RANK = """
import sys, time
from pathlib import Path
from relora_ds.train.launcher_watch import LauncherWatch

watch, place = LauncherWatch(), Path(sys.argv[1])
(place / "watching").touch()
while not watch.is_gone() and not (place / "end").exists():
    time.sleep(0.02)
(place / ("gone" if watch.is_gone() else "owned")).touch()
"""


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    rank = _start([sys.executable, "-c", _RANK, str(tmp_path)], {"RANK": "0"})
    _wait_for(tmp_path / "watching")
    assert rank.poll() is None, "a launcher that reads is not gone"
    assert rank.stdout is not None
    rank.stdout.close()
    _wait_for(tmp_path / "gone")
    assert rank.wait(10) == 0


def test_a_parent_that_dies(tmp_path: Path) -> None:
    """The grandchild's output goes to a file: only its parent changes."""
    script = '"$@" >/dev/null 2>&1 & wait'
    command = ["bash", "-c", script, "launcher", sys.executable, "-c", _RANK, str(tmp_path)]
    launcher = _start(command, {"RANK": "0"})
    _wait_for(tmp_path / "watching")
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()
    _wait_for(tmp_path / "gone")


def test_a_process_of_its_own_may_lose_its_terminal(tmp_path: Path) -> None:
    process = _start([sys.executable, "-c", _RANK, str(tmp_path)], {})
    _wait_for(tmp_path / "watching")
    assert process.stdout is not None
    process.stdout.close()
    (tmp_path / "end").touch()
    _wait_for(tmp_path / "owned")
    assert process.wait(10) == 0


def _start(command: list[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment | variables, stdout=subprocess.PIPE, stderr=None
    )


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not happen"
        time.sleep(0.02)
