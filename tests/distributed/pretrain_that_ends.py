"""launch/pretrain.py on a machine where one rank meets its end in a step: `END` says how and when.

`END` is "HOW RANK STEP", as "kill 1 3". "tell 1 3": all ranks find the same, rank 1 a little later.
A collective may take as long as the run file says, but a rank is given up as if that were
`PATIENCE_MINUTES`: who is heard first does not depend on how busy the machine is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from relora_ds.errors import CheckpointError
from relora_ds.train.lifetime.lifetime import Lifetime
from relora_ds.train.loop import Trainer
from relora_ds.train.main import main

_HOW, _RANK, _STEP = os.environ.get("END", "never 0 0").split()
_update = Trainer._update
_watch_peers = Lifetime.watch_peers


def _fail() -> None:
    raise ZeroDivisionError("on purpose")


def _tell() -> None:
    if os.environ.get("RANK", "0") == _RANK:
        time.sleep(0.5)
    raise CheckpointError("told to all ranks")


def _wait() -> None:
    threading.Event().wait()


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _never_destroyed(group: object = None) -> None:
    threading.Event().wait()


_ENDS: dict[str, Callable[[], None]] = {
    "raise": _fail,
    "tell": _tell,
    "wait": _wait,
    "stop": _stop,
    "kill": _kill,
    "never": lambda: None,
}


def _faulty(self: Trainer, phase: Any, engine: Any, session: Any, step: int, seen: Any) -> Any:
    meets = _HOW == "tell" or os.environ.get("RANK", "0") == _RANK
    if meets and step + 1 == int(_STEP):
        _ENDS[_HOW]()
    return _update(self, phase, engine, session, step, seen)


def _impatient(self: Lifetime, world_size: int, timeout_minutes: float) -> None:
    _watch_peers(self, world_size, float(os.environ["PATIENCE_MINUTES"]))


if __name__ == "__main__":
    Trainer._update = _faulty
    Lifetime.watch_peers = _impatient
    # what NCCL does while a peer has queued work
    torch.distributed.destroy_process_group = _never_destroyed
    sys.exit(main(sys.argv[1:]))
