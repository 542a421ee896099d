"""What this process is doing right now, in words, so that a failure can say where it happened.

A process has one stack of activities for its main line of work. Any thread may read it: the one
that watches for a stuck run does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_stack: list[str] = []
_step: int | None = None


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Name what happens inside the block; an exception that leaves it remembers the name.

    Args:
        what: a few words without the step, as "merge" or "save: shards".
    """
    depth = len(_stack)
    _stack.append(what)
    try:
        yield
    except BaseException as error:
        if not hasattr(error, "_activity"):  # the innermost block says most
            error._activity = current()  # pyright: ignore[reportAttributeAccessIssue]
        raise
    finally:
        del _stack[depth:]


def at_step(step: int | None) -> None:
    """Remember which update is under way, counted from 1; None outside of training."""
    global _step
    _step = step


def current() -> str:
    """Where the process is, as "step 12: save: shards".

    Where nothing is named it is "start" before training and "step 12: between its parts" within.
    """
    where = ": ".join(_stack) or ("start" if _step is None else "between its parts")
    return where if _step is None else f"step {_step}: {where}"


def origin(error: BaseException) -> str:
    """Where an exception came from, in the words of `current`."""
    return getattr(error, "_activity", None) or current()
