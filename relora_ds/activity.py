"""What this process is doing right now, in words, so that a failure can say where it happened.

A process has one stack of activities for its main line of work. Any thread may read it: the one
that watches for a stuck run does. What another thread does is named for the errors that it raises.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_stack: list[str] = []
_of_thread = threading.local()
_step: int | None = None
_unlimited = 0
_moved_at = time.monotonic()


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Name what happens inside the block; an exception that leaves it remembers the name.

    Args:
        what: a few words without the step, as "merge" or "save: shards".
    """
    stack = _own_stack()
    depth = len(stack)
    stack.append(what)
    _moved_in(stack)
    try:
        yield
    except BaseException as error:
        if not hasattr(error, "_activity"):  # the innermost block says most
            error._activity = _in_words(stack)  # pyright: ignore[reportAttributeAccessIssue]
        raise
    finally:
        del stack[depth:]
        _moved_in(stack)


def at_step(step: int | None) -> None:
    """Remember which update is under way, counted from 1; None outside of training."""
    global _step
    _step = step
    moved()


@contextmanager
def unlimited() -> Iterator[None]:
    """Say that the work inside is a host's and may take any time, as a save or an export does.

    A step else waits for other ranks and for devices, and must not stand still for longer than a
    collective may take.
    """
    global _unlimited
    _unlimited += 1
    try:
        yield
    finally:
        _unlimited -= 1
        moved()


def moved() -> None:
    """Note that the work goes on. Entering and leaving an activity, and a new step, do so too."""
    global _moved_at
    _moved_at = time.monotonic()


def _moved_in(stack: list[str]) -> None:
    if stack is _stack:  # another thread goes on although this one may be stuck
        moved()


def stalled_s() -> float:
    """For how long a step has stood still; 0 outside of steps and in unlimited work."""
    return 0.0 if _step is None or _unlimited else time.monotonic() - _moved_at


def current() -> str:
    """Where the process is, as "step 12: save: shards".

    Where nothing is named it is "start" before training and "step 12: between its parts" within.
    """
    return _in_words(_stack)


def origin(error: BaseException) -> str:
    """Where an exception came from, in the words of `current`."""
    return getattr(error, "_activity", None) or current()


def _own_stack() -> list[str]:
    """Of the thread that asks."""
    if threading.current_thread() is threading.main_thread():
        return _stack
    return _of_thread.__dict__.setdefault("stack", [])


def _in_words(stack: list[str]) -> str:
    where = ": ".join(stack) or ("start" if _step is None else "between its parts")
    return where if _step is None else f"step {_step}: {where}"
