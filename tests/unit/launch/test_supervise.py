"""`launch/supervise.sh` returns the code of the rank that failed first, and ends only its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
_SCRIPT = """
. launch/supervise.sh
on_nodes() { bash -c "$1"; }
asked="$1"
code=0
supervise bash -c "$2" || code=$?
exit "$code"
"""


def _supervise(launcher: str, asked: str = "") -> tuple[int, str]:
    """Exit code and last line of a launch whose launcher is a few lines of shell."""
    job = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", _SCRIPT, "train.sh", asked, launcher],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return job.returncode, job.stderr.rstrip().splitlines()[-1]


def _told(code: int) -> str:
    return f"echo 'ROOT CAUSE rank 1 (step 3: forward): it broke (exit code {code})' >&2"


def _node(code: int) -> str:
    return f"echo 'pdsh@here: node{code}: ssh exited with exit code {code}' >&2"


@pytest.mark.parametrize(
    ("launcher", "code"),
    [
        pytest.param(f"{_told(1)}; {_node(7)}; {_node(1)}; exit 7", 1, id="error of python"),
        pytest.param(f"{_told(5)}; {_node(7)}; exit 7", 5, id="told, but its node is not heard"),
        pytest.param(f"{_told(4)}; {_node(4)}; {_node(7)}; exit 7", 4, id="checkpoint"),
        pytest.param(f"{_told(3)}; exit 1", 3, id="launcher that knows only failure"),
        pytest.param(f"{_node(7)}; exit 7", 7, id="a node was lost, no cause told"),
        pytest.param("exit 0", 1, id="not completed"),
    ],
)
def test_the_code_is_that_of_the_cause(launcher: str, code: int) -> None:
    assert _supervise(launcher)[0] == code


@pytest.mark.parametrize(
    ("launcher", "code"),
    [
        pytest.param("exit 1", 75, id="nothing had begun"),
        pytest.param("exit 241", 75, id="a rank that could not listen yet"),
        pytest.param(f"{_told(3)}; exit 241", 241, id="a rank had failed before"),
        pytest.param(f"{_told(1)}; exit 1", 1, id="the save that was asked for failed"),
        pytest.param(f"{_told(75)}; exit 7", 75, id="asked before the first step"),
    ],
)
def test_a_failure_after_a_request_to_stop_is_no_stop(launcher: str, code: int) -> None:
    assert _supervise(launcher, asked="yes")[0] == code


def test_the_last_line_names_the_cause() -> None:
    code, line = _supervise(f"{_told(1)}; {_node(7)}; exit 7")
    assert line == (
        f"train.sh: exit code {code}: ROOT CAUSE rank 1 (step 3: forward): it broke (exit code 1)"
    )


_NOTE = '#!/bin/sh\necho "$0 $*" >>"$SIGNALLED"\nexit 1\n'
_PROGRAMS = {
    "pkill": _NOTE,
    "pgrep": _NOTE,
    "deepspeed": '#!/bin/sh\n[ -z "$LAUNCHER_S" ] || exec sleep "$LAUNCHER_S"\nexit 3\n',
    # the last of its arguments is for a shell on the node
    "pdsh": '#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n',
}


def _launch(tmp_path: Path, script: str, **environment: str) -> subprocess.Popen[str]:
    """Start a launch script where pkill and pgrep write down their arguments and do nothing."""
    for name, content in _PROGRAMS.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("node-a slots=2\n")
    hosts = [str(tmp_path / "hosts")] if script == "multi_node.sh" else []
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "SIGNALLED": str(tmp_path / "signalled"), "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        ["bash", f"launch/{script}", *hosts, "configs/run/quickstart.yaml"],
        cwd=ROOT,
        env=os.environ | {"VENV": "none", "DS_ACCELERATOR": "cpu"} | own | environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("script", ["single_node.sh", "multi_node.sh"])
@pytest.mark.parametrize("asked", [False, True])
def test_every_signal_is_for_processes_of_this_launch(
    tmp_path: Path, script: str, asked: bool
) -> None:
    """Whatever a script calls its own variables: none of them may become a pattern."""
    with _launch(tmp_path, script, LAUNCHER_S="60" if asked else "", PROCESSES="2") as job:
        if asked:
            _wait_until_it_listens(job)
            job.send_signal(signal.SIGTERM)
        _, said = job.communicate(timeout=60)
    assert job.returncode == (75 if asked else 3), said
    signalled = (tmp_path / "signalled").read_text().splitlines()
    assert [line for line in signalled if "/pkill -KILL -f " in line]
    assert bool([line for line in signalled if "/pkill -TERM -e -f " in line]) == asked
    launch = re.search(rf"--launch-id=[^ ]+-{job.pid}-[0-9]+", "\n".join(signalled))
    assert launch is not None
    own = f"/bin/python -u launch/pretrain.py --local_rank=0 {launch[0]} RUN.yaml"
    others = ("/bin/python -u launch/pretrain.py --launch-id=2 RUN.yaml", "python -m pytest -n 2")
    others += (f"bash launch/{script} RUN.yaml", f"python -u launch/pretrain.py {launch[0]}2")
    for line in signalled:
        if session := re.fullmatch(r".*/pkill -KILL -g (\d+) -s \1", line):
            assert int(session[1]) > 1
            continue
        pattern = line.partition(" -f ")[2]
        assert re.search(pattern, own), line
        assert not [other for other in others if re.search(pattern, other)], line


def _wait_until_it_listens(job: subprocess.Popen[str]) -> None:
    """It has started the launcher, and looks once a second."""
    deadline = time.monotonic() + 30
    while not {"sleep 60", "sleep 1"} <= set(_below(job.pid)):
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.05)


def _below(pid: int) -> Iterator[str]:
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            yield " ".join(child.cmdline())


def test_a_later_process_of_the_number_is_left_alone() -> None:
    """A launcher's number is used again once it has ended: what it means is told by its start."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
        script = f"set -euo pipefail\n. launch/supervise.sh\nlauncher={stranger.pid}\n"
        script += "launcher_started=1\nend_session"
        subprocess.run(["bash", "-c", script], cwd=ROOT, check=True, timeout=60)
        assert stranger.poll() is None
        script = script.replace("started=1", f'started="$(started_at {stranger.pid})"')
        subprocess.run(["bash", "-c", script], cwd=ROOT, check=True, timeout=60)
        assert stranger.wait(10) == -signal.SIGKILL, "its own is ended"


def test_the_id_of_a_launch_cannot_be_changed() -> None:
    script = "set -euo pipefail\n. launch/supervise.sh\nlaunch_id=2\necho changed"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "changed" not in done.stdout
