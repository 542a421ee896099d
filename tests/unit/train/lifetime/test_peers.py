"""A rank that is stopped cannot end itself, and is ended by another one; a stuck rank can."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from relora_ds.train.lifetime import peers
from relora_ds.train.lifetime.peers import Hub
from relora_ds.train.lifetime.watch import described

ROOT = Path(__file__).resolve().parents[4]
# leaves as soon as it has heard why the run ends
_RANK_1 = """
import os, sys, threading
from relora_ds.train.lifetime.peers import Address, Spoke
address = Address(int(sys.argv[1]), sys.argv[2])
spoke = Spoke(1, 600.0, lambda cause: os._exit(7), "127.0.0.1", address)
spoke.start()
threading.Event().wait()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_stuck_rank_that_is_stopped_is_killed(
    monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    monkeypatch.setattr(peers, "_ANSWER_S", 0.5 if stopped else 30.0)
    ending = threading.Event()
    hub = Hub(0, 600.0, lambda cause: ending.set(), 2)
    hub.start()
    command = [sys.executable, "-c", _RANK_1, str(hub.address.port), hub.address.token]
    with subprocess.Popen(command, cwd=ROOT) as rank:
        deadline = time.monotonic() + 30
        while not hub._others:
            assert time.monotonic() < deadline
            assert rank.poll() is None
            time.sleep(0.02)
        if stopped:
            rank.send_signal(signal.SIGSTOP)
            while psutil.Process(rank.pid).status() != psutil.STATUS_STOPPED:
                time.sleep(0.02)
        who = hub._others[1].who
        hub._decide(described(who, "step 3: forward", "no progress", "stuck", (1,)))
        assert ending.wait(10)
        hub.end_silent()
        assert rank.wait(30) == (-signal.SIGKILL if stopped else 7)
    hub.close()
