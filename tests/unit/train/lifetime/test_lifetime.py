"""How a process of a run leaves."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from relora_ds.errors import CheckpointError, PreemptedError
from relora_ds.train import lifetime
from relora_ds.train.lifetime.failure import Failure, describe
from relora_ds.train.lifetime.lifetime import Lifetime

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


@dataclass
class Watch:
    """What ranks know of each other, of which the first failure is known."""

    first: Failure | None = None

    def publish(self, failure: Failure, wait_s: float) -> Failure:
        return self.first or failure

    def drain(self, wait_s: float) -> None:
        """Everybody knows."""


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (None, ""),
        (describe(PreemptedError("asked to stop"), 0), ""),
        (
            describe(CheckpointError("step_5: damaged"), 0),
            "rank 1: another rank had failed; "
            "ROOT CAUSE rank 0 (start): step_5: damaged (exit code 4)\n",
        ),
    ],
)
def test_a_launcher_that_ends_the_rest_is_not_the_cause(
    first: Failure | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "1")
    own = Lifetime()
    monkeypatch.setattr(own, "_watch", cast(Any, Watch(first)))
    own._tell_of_request("asked to stop (SIGTERM) before training began")
    assert capfd.readouterr().err == said
