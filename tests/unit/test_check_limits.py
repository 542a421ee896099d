"""The size limits of files, functions and folders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_limits.py"


def _check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), str(root)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def _function(name: str, lines: int, indent: str = "") -> str:
    """Source of a function of exactly `lines` lines, docstring included."""
    body = [f'{indent}    """Counts."""'] + [f"{indent}    x = 1"] * (lines - 2)
    return "\n".join([f"{indent}def {name}():", *body]) + "\n"


def _fill(folder: Path, files: int) -> None:
    """A folder with so many source files of both kinds, and one that is no source."""
    folder.mkdir(parents=True)
    for number in range(files - 1):
        (folder / f"f{number}.py").touch()
    (folder / "kernel.c").touch()
    (folder / "notes.txt").touch()


def test_a_project_at_the_limits_passes(tmp_path: Path) -> None:
    for directory in ("relora_ds/deep", "tools", "tests"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "relora_ds" / "deep" / "a.py").write_text("x = 1\n" * 400)
    (tmp_path / "tools" / "b.py").write_text("@decorator\n" + _function("fits", 60))
    (tmp_path / "tests" / "empty.py").touch()
    (tmp_path / "elsewhere.py").write_text("x = 1\n" * 500)
    _fill(tmp_path / "relora_ds" / "full", 12)
    _fill(tmp_path / "tests" / "many", 20)
    done = _check(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_offender_is_listed(tmp_path: Path) -> None:
    for directory in ("relora_ds/deep", "launch", "tests"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "relora_ds" / "deep" / "long.py").write_text("x = 1\n" * 401)
    method = "class A:\n" + _function("method", 61, indent="    ")
    (tmp_path / "launch" / "function.py").write_text(method + "async " + _function("task", 70))
    (tmp_path / "tests" / "broken.py").write_text("x = 1\ndef broken(:\n")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "long.py").write_text("x = 1\n" * 402)
    _fill(tmp_path / "relora_ds" / "full", 13)
    _fill(tmp_path / "relora_ds" / "full" / "inner", 14)
    done = _check(tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "relora_ds/deep/long.py:1: file has 401 lines, the limit is 400",
        "launch/function.py:2: function method has 61 lines, the limit is 60",
        "launch/function.py:63: function task has 70 lines, the limit is 60",
        "benchmarks/long.py:1: file has 402 lines, the limit is 400",
        "tests/broken.py:2: not valid Python: invalid syntax",
        "relora_ds/full: folder has 13 source files, the limit is 12",
        "relora_ds/full/inner: folder has 14 source files, the limit is 12",
    ]
