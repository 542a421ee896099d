"""Stopping at a step boundary when the scheduler asks for it or the launcher is gone."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

from relora_ds.train.launcher_watch import LauncherWatch

_ONE_REQUEST_S = 5.0


class StopSignal:
    """Remembers SIGTERM and SIGUSR1; all ranks agree on it at the next step boundary.

    A signal that comes much later ends the process at once; one that follows closely is the same
    request on another path, from a launcher and its process group or its scheduler. Signals reach
    ranks at different times, so the loop passes `requested` on to the other ranks and never acts on
    its own flag alone. The loss of a rank's launcher counts as a signal to that rank.

    Args:
        launcher: what started this process.
    """

    def __init__(self, launcher: LauncherWatch) -> None:
        self._launcher = launcher
        self._requested_at: float | None = None
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

    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._requested_at is not None or self._launcher.is_gone()
