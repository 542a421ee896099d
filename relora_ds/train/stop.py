"""Stopping at a step boundary when the scheduler asks for it or the launcher is gone."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

import torch

from relora_ds.train.launcher_watch import LauncherWatch

_ONE_REQUEST_S = 5.0


class StopSignal:
    """Remembers SIGTERM and SIGUSR1; all ranks agree on it at the next step boundary.

    A signal that comes much later ends the process at once; one that follows closely is the same
    request on another path, from a launcher and its process group or its scheduler. Signals reach
    ranks at different times, so the loop asks `agreed`, a collective, and never acts on its own
    flag. The loss of a rank's launcher counts as a signal to that rank.

    Args:
        launcher: what started this process.
    """

    def __init__(self, launcher: LauncherWatch) -> None:
        self._launcher = launcher
        self._requested_at: float | None = None
        # its own group on the host: the answer must not wait for work queued on a device
        self._group = torch.distributed.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested_at is None:
            self._requested_at = now
        elif now - self._requested_at > _ONE_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. A collective call."""
        flag = torch.tensor([int(self._requested_at is not None or self._launcher.is_gone())])
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag.item())
