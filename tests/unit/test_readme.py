"""The README tells the truth about what can be checked cheaply."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_tree_is_the_one_that_is_there() -> None:
    command = [sys.executable, "tools/describe_tree.py"]
    tree = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert tree in (ROOT / "README.md").read_text(), "run tools/describe_tree.py and paste it"
