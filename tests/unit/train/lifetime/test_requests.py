"""Who may ask a process to stop, and what it does about that before and during training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[4]
# prints nothing but what the product prints: the answer is the name of a file
_RANK = """
import sys, time
from pathlib import Path
from relora_ds.train.lifetime import requests
assert not {"torch", "deepspeed", "numpy"} & set(sys.modules), "a process listens before it imports"
requests._ONE_REQUEST_S = float(sys.argv[3])
heard, place = requests.listen(), Path(sys.argv[1])
if sys.argv[2] == "training":
    heard.defer()
(place / "pid").write_text(str(requests.os.getpid()))
(place / "listening").touch()
while heard.pending is None and not (place / "end").exists():
    time.sleep(0.02)
(place / (heard.pending or "nobody").replace(" ", "_")).touch()
while (place / "saving").exists():
    time.sleep(0.02)
sys.exit(3)
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _start(
    started: list[subprocess.Popen[str]],
    place: Path,
    phase: str = "training",
    rank: str | None = "0",
    below: tuple[str, ...] = (),
    one_request_s: float = 5.0,
    output: int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """A process that listens; below a shell script if there is one."""
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    if rank is not None:
        environment["RANK"] = rank
    command = [*below, sys.executable, "-c", _RANK, str(place), phase, str(one_request_s)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    started.append(process)
    _wait_for(place / "listening")
    return process


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name}: there is {os.listdir(path.parent)}"
        time.sleep(0.02)


def _wait_for_end(place: Path) -> None:
    pid, deadline = int((place / "pid").read_text()), time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.02)


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_before_training_there_is_nothing_to_save(
    started: list[subprocess.Popen[str]], tmp_path: Path, number: str
) -> None:
    process = _start(started, tmp_path, "start", rank=None)
    process.send_signal(signal.Signals[number])
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert output == (
        f"rank 0: asked to stop ({number}) before training began: there is nothing to save "
        "(exit code 75)\n"
    )


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_in_training_a_request_is_remembered(
    started: list[subprocess.Popen[str]], tmp_path: Path, number: str
) -> None:
    process = _start(started, tmp_path, rank=None)
    for _ in range(3):  # a launcher, its process group and a scheduler may all pass it on
        process.send_signal(signal.Signals[number])
    _wait_for(tmp_path / number)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (3, "")


def test_a_late_second_request_ends_a_save_at_once(
    started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "saving").touch()
    process = _start(started, tmp_path, one_request_s=0.2)
    process.send_signal(signal.SIGTERM)
    _wait_for(tmp_path / "SIGTERM")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "asked again to stop (SIGINT): ends at once; the last checkpoint is intact" in output


def test_what_nohup_ignores_stays_ignored(
    started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    ignoring = ("bash", "-c", 'trap "" HUP; exec "$@"', "nohup")
    process = _start(started, tmp_path, "start", below=ignoring)
    process.send_signal(signal.SIGHUP)
    (tmp_path / "end").touch()
    _wait_for(tmp_path / "nobody")
    assert process.wait(30) == 3


def test_a_reader_that_leaves(started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    process = _start(started, tmp_path)
    assert process.poll() is None, "a launcher that reads is not gone"
    assert process.stdout is not None
    process.stdout.close()
    _wait_for(tmp_path / "nobody_reads_the_output")
    assert process.wait(10) == 3


@pytest.mark.parametrize("phase", ["start", "training"])
@pytest.mark.parametrize("killed", ["parent", "grandparent"])
def test_a_launcher_that_is_killed(
    started: list[subprocess.Popen[str]], tmp_path: Path, phase: str, killed: str
) -> None:
    """The rank's output goes to a file: only its ancestors change."""
    inner = '"$@" >"$OUT" 2>&1 & echo $$ >"$OUT.parent"; wait'
    outer = f"bash -c '{inner}' launcher \"$@\" & wait"
    environment_file = tmp_path / "out"
    os.environ["OUT"] = str(environment_file)
    try:
        script = _start(
            started,
            tmp_path,
            phase,
            below=("bash", "-c", outer, "script"),
            output=subprocess.DEVNULL,
        )
    finally:
        del os.environ["OUT"]
    parent = int((tmp_path / "out.parent").read_text())
    os.kill(parent if killed == "parent" else script.pid, signal.SIGKILL)
    _wait_for_end(tmp_path)
    if phase == "start":
        said = environment_file.read_text()
        assert "asked to stop (the launcher bash (" in said
        assert "there is nothing to save" in said
    else:
        assert [path.name for path in tmp_path.glob("the_launcher_bash_*")]
    if killed == "grandparent":
        assert psutil.pid_exists(parent), "it was alive all the time"
        os.kill(parent, signal.SIGKILL)


def test_a_login_that_ends_leaves_a_run_alone(
    started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    """An interactive shell gives each job a process group of its own."""
    job = '"$@" >/dev/null 2>&1 & wait'
    login = 'set -m; bash -c "$JOB" launcher "$@" & wait'
    os.environ["JOB"] = job
    try:
        shell = _start(
            started, tmp_path, below=("bash", "-c", login, "login"), output=subprocess.DEVNULL
        )
    finally:
        del os.environ["JOB"]
    shell.kill()
    shell.wait()
    time.sleep(1.5)
    assert not list(tmp_path.glob("the_launcher*"))
    (tmp_path / "end").touch()
    _wait_for(tmp_path / "nobody")
    _wait_for_end(tmp_path)


def test_a_rank_that_was_abandoned_before_it_could_look(tmp_path: Path) -> None:
    """As when a launcher is killed while the interpreter of its ranks starts."""
    script = 'RANK=0 bash -c "sleep 0.5; exec \\"\\$@\\"" rank "$@" >"$OUT" 2>&1 & exit'
    command = ["bash", "-c", script, "launcher", sys.executable, "-c", _RANK, str(tmp_path)]
    environment = os.environ | {"OUT": str(tmp_path / "out")}
    subprocess.run([*command, "start", "5"], cwd=ROOT, env=environment, check=True)
    _wait_for(tmp_path / "out")
    deadline = time.monotonic() + 30
    while "exit code 75" not in (said := (tmp_path / "out").read_text()):
        assert time.monotonic() < deadline, said
        time.sleep(0.02)
    assert "the launcher was gone at the start" in said


def test_a_process_of_its_own_may_lose_its_terminal(
    started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = _start(started, tmp_path, rank=None)
    assert process.stdout is not None
    process.stdout.close()
    (tmp_path / "end").touch()
    _wait_for(tmp_path / "nobody")
    assert process.wait(10) == 3
