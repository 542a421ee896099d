"""The size limits of files and functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[4] / "tools" / "check_limits.py"


def _check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), str(root)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def _function(name: str, lines: int, indent: str = "") -> str:
    """Source of a function of exactly `lines` lines, docstring included."""
    body = [f'{indent}    """Counts."""'] + [f"{indent}    x = 1"] * (lines - 2)
    return "\n".join([f"{indent}def {name}():", *body]) + "\n"


def test_a_project_at_the_limits_passes(tmp_path: Path) -> None:
    for directory in ("relora_ds/deep", "tools", "tests"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "relora_ds" / "deep" / "a.py").write_text("x = 1\n" * 400)
    (tmp_path / "tools" / "b.py").write_text("@decorator\n" + _function("fits", 60))
    (tmp_path / "tests" / "empty.py").touch()
    (tmp_path / "elsewhere.py").write_text("x = 1\n" * 500)
    done = _check(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_offender_is_listed(tmp_path: Path) -> None:
    for directory in ("relora_ds/deep", "launch", "tests"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "relora_ds" / "deep" / "long.py").write_text("x = 1\n" * 401)
    method = "class A:\n" + _function("method", 61, indent="    ")
    (tmp_path / "launch" / "function.py").write_text(method + "async " + _function("task", 70))
    (tmp_path / "tests" / "broken.py").write_text("x = 1\ndef broken(:\n")
    done = _check(tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "relora_ds/deep/long.py:1: file has 401 lines, the limit is 400",
        "launch/function.py:2: function method has 61 lines, the limit is 60",
        "launch/function.py:63: function task has 70 lines, the limit is 60",
        "tests/broken.py:2: not valid Python: invalid syntax",
    ]
