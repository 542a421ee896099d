"""Noticing that a launcher is gone, so that no rank goes on training for nobody."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from dataclasses import dataclass
from pathlib import Path

_GONE = select.POLLERR | select.POLLHUP
_ENDED = select.POLLIN
"""What a descriptor of a process reports once that process has ended."""


@dataclass(frozen=True)
class Ancestor:
    """A process that this one descends from.

    Args:
        pid: of the process.
        name: of its program.
        group: its process group.
    """

    pid: int
    name: str
    group: int


class Launcher:
    """What started this process: its parent and those above it, and the reader of what it prints.

    A launcher that is killed cannot say goodbye. On its own machine a descriptor of its process
    tells; on another machine all processes here live on, but the connection that carried the output
    breaks. A rank that prints finds out; a silent one would train for ever.

    Launchers are the parent and, above it, the processes of the parent's group: a job's scripts and
    launchers share one, and an interactive shell is in another. So a login may end and leave a run
    that was started with nohup alone, while nothing below a script that is killed goes on.

    A process that no launcher started belongs to itself and is never abandoned.
    """

    def __init__(self) -> None:
        launched = "RANK" in os.environ
        self._parent = os.getppid()
        self.is_lost_at_start = launched and _was_abandoned()
        """Whether the launcher ended before this process looked for it."""
        self._watched: dict[int, str] = {}
        self._events: dict[int, int] = {}
        if launched:
            for ancestor in launchers():
                self._watch_process(ancestor)
            for descriptor in _readers_of((sys.stdout, sys.stderr)):
                self._watched[descriptor] = "nobody reads the output"
                self._events[descriptor] = 0

    def register(self, poll: select.poll) -> None:
        """Have `poll` report what `loss` understands."""
        for descriptor, events in self._events.items():
            poll.register(descriptor, events)

    def loss(self, descriptor: int, events: int) -> str | None:
        """What an event means, in words; None if it is no loss of a launcher."""
        if descriptor not in self._watched or not events & (_GONE | _ENDED):
            return None
        return self._watched[descriptor]

    def _watch_process(self, ancestor: Ancestor) -> None:
        # an old kernel, or a sandbox: the process then notices a new parent only
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(ancestor.pid)
            self._watched[descriptor] = f"the launcher {ancestor.name} ({ancestor.pid}) is gone"
            self._events[descriptor] = _ENDED

    def has_new_parent(self) -> bool:
        """Whether the parent of the start is gone; for systems without descriptors of processes."""
        return "RANK" in os.environ and os.getppid() != self._parent


def launchers() -> list[Ancestor]:
    """The parent, and above it all processes in the parent's process group."""
    parent = _ancestor(os.getppid())
    chain = [] if parent is None else [parent]
    while chain and chain[-1].pid > 1:
        above = _ancestor(_parent_of(chain[-1].pid))
        if above is None or above.group != chain[0].group:
            break
        chain.append(above)
    return chain


def _was_abandoned() -> bool:
    """Whether the process that forked this one is no longer its parent.

    A child starts in its parent's process group. Where the parent is in another group although this
    process did not leave its own, the parent is a reaper. A process that leads its group, as under
    torchrun, cannot tell so; its reaper is the first process of the machine, which in a container
    may as well be torchrun, a Python program.
    """
    parent = _ancestor(os.getppid())
    if parent is None:
        return True
    if os.getpgrp() != os.getpid():
        return parent.group != os.getpgrp()
    if parent.pid != 1:
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return not _program(parent.pid).startswith("python")
    return parent.name in ("systemd", "init", "tini", "dumb-init")


def _program(pid: int) -> str:
    """Name of the file that a process executes; empty for one of another user."""
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name
    except OSError:
        return ""


def _ancestor(pid: int) -> Ancestor | None:
    fields = _stat(pid)
    return None if fields is None else Ancestor(pid, fields[0], int(fields[3]))


def _parent_of(pid: int) -> int:
    fields = _stat(pid)
    return 0 if fields is None else int(fields[2])


def _stat(pid: int) -> list[str] | None:
    """Name, state, parent, process group, ... of a process; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    name, rest = text[text.index("(") + 1 :].rsplit(")", 1)  # a name may hold blanks and brackets
    return [name, *rest.split()]


def _readers_of(streams: tuple[object, ...]) -> list[int]:
    """Descriptors of the streams that somebody reads now; a pipe may have been broken all along."""
    descriptors = []
    for stream in streams:
        try:
            descriptors.append(stream.fileno())  # pyright: ignore[reportAttributeAccessIssue]
        except (AttributeError, OSError, ValueError):  # replaced, or closed
            continue
    return sorted(set(descriptors) - set(_broken(descriptors)))


def _broken(descriptors: list[int]) -> list[int]:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, 0)  # errors and hang-ups are always reported
    return [descriptor for descriptor, events in poll.poll(0) if events & _GONE]
