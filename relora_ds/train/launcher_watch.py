"""Noticing that the launcher is gone, so that no rank goes on training for nobody."""

from __future__ import annotations

import os
import select
import sys

_GONE = select.POLLERR | select.POLLHUP


class LauncherWatch:
    """What started this process: its parent, and the reader of what it prints.

    A launcher that is killed cannot say goodbye. On its own machine the rank gets another parent;
    on another machine the parent lives on, but the connection that carried the output breaks. A
    rank that prints finds out; a silent one would train for ever.

    A process that no launcher started belongs to itself and is never abandoned.
    """

    def __init__(self) -> None:
        self._parent = os.getppid() if "RANK" in os.environ else None
        self._outputs = [] if self._parent is None else _readers_of((sys.stdout, sys.stderr))

    def is_gone(self) -> bool:
        """Whether the launcher ended before this process. Cheap enough for every step."""
        if self._parent is None:
            return False
        return os.getppid() != self._parent or bool(_broken(self._outputs))


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
