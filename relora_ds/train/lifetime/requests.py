"""Listening to those who may ask a run to stop, from the first lines of a process to its last."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from relora_ds.train.lifetime.launcher import Launcher

STOPPED = 75
"""Exit code of a process that was asked to stop; see `errors.PreemptedError`."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""Those that a shell or nohup switches off for a process in the background."""
_ONE_REQUEST_S = 5.0
_LOOK_S = 1.0


class StopRequests:
    """Hears SIGTERM, SIGINT, SIGHUP, SIGUSR1 and the loss of a launcher, on a thread of its own.

    The thread answers even while the main one is inside a library. Before training a request ends
    the process at once: there is nothing to save. From `defer` on it is remembered, and the loop
    saves first. A signal that comes much later than the first request ends the process at once, in
    a save as well, which leaves the checkpoint before it intact. One that follows closely is the
    same request on another path, from a launcher and its process group or its scheduler.
    """

    def __init__(self) -> None:
        self.pending: str | None = None
        """Who asked, in words; None if nobody did."""
        self.on_leave: Callable[[str], None] = lambda reason: None
        """Called with a sentence before the process ends at once; must return soon."""
        self._asked_at = 0.0
        self._deferred = False
        self._lock = threading.Lock()
        self._launcher = Launcher()

    def listen(self) -> None:
        """Take the signals over and start the thread. Called once, by the main thread."""
        inbox, outbox = os.pipe()
        os.set_blocking(outbox, False)
        for number in _SIGNALS:
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if not (ignored and number in _MAY_BE_IGNORED):
                signal.signal(number, _noted)
        # the thread reads numbers there, whatever the main thread is busy with
        signal.set_wakeup_fd(outbox, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(inbox,), name="requests", daemon=True).start()
        if self._launcher.is_lost_at_start:
            self._ask("the launcher was gone at the start", again=False)

    def defer(self) -> None:
        """Remember requests from now on instead of leaving: somebody asks for `pending`."""
        with self._lock:
            self._deferred = True

    def _hear(self, inbox: int) -> None:
        poll = select.poll()
        poll.register(inbox, select.POLLIN)
        self._launcher.register(poll)
        orphaned = False
        while True:
            for descriptor, events in poll.poll(1000 * _LOOK_S):
                if descriptor == inbox:
                    for number in os.read(inbox, 64):
                        if number in _SIGNALS:
                            self._ask(signal.Signals(number).name, again=True)
                elif loss := self._launcher.loss(descriptor, events):
                    poll.unregister(descriptor)
                    self._ask(loss, again=False)
            if not orphaned and self._launcher.has_new_parent():
                orphaned = True
                self._ask("the launcher is gone", again=False)

    def _ask(self, who: str, again: bool) -> None:
        """Note a request.

        Args:
            who: asks, in words.
            again: whether a later request of this kind means impatience.
        """
        with self._lock:
            now = time.monotonic()
            first = self.pending is None
            if first:
                self.pending, self._asked_at = who, now
            deferred = self._deferred
            late = now - self._asked_at > _ONE_REQUEST_S
        if first and not deferred:
            self._leave(f"asked to stop ({who}) before training began: there is nothing to save")
        elif again and late:
            self._leave(f"asked again to stop ({who}): ends at once; the last checkpoint is intact")

    def _leave(self, reason: str) -> None:
        say(f"rank {os.environ.get('RANK', '0')}: {reason} (exit code {STOPPED})")
        self.on_leave(reason)
        os._exit(STOPPED)


_listening: StopRequests | None = None


def listen() -> StopRequests:
    """The one listener of this process, which starts to listen with the first call."""
    global _listening
    if _listening is None:
        _listening = StopRequests()
        if threading.current_thread() is threading.main_thread():
            _listening.listen()
    return _listening


def say(text: str) -> None:
    """Print lines to standard error from any thread, whole, whoever still reads them."""
    with contextlib.suppress(OSError, ValueError):  # closed, or its terminal is gone
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode())


def _noted(number: int, frame: FrameType | None) -> None:
    """Do nothing: the thread has read the number. Without a handler the process would end."""
