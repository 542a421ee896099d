"""`launch/supervise.sh` returns the exit code of the rank that failed first."""

from __future__ import annotations

import subprocess
from pathlib import Path

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
