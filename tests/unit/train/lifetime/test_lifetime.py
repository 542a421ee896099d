"""How a process of a run leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from relora_ds.train import lifetime

ROOT = Path(lifetime.__file__).resolve().parents[3]
_LEAVES = """
import atexit, sys, threading
from pathlib import Path
from relora_ds.train.lifetime.lifetime import leave_process
atexit.register(Path(sys.argv[1]).touch)
threading.Thread(target=threading.Event().wait).start()
print("all of it")
leave_process(3)
"""


def test_a_process_leaves_with_what_it_wrote_and_waits_for_no_thread(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _LEAVES, str(tmp_path / "registered")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "all of it\n", "")
    assert (tmp_path / "registered").exists()
