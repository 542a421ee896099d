"""What is said when a process fails: one line with the root cause, and a file with all of it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from relora_ds.activity import origin
from relora_ds.errors import ConfigError, ReloraError
from relora_ds.files.regular import open_own
from relora_ds.redaction import mask_values, secret_values
from relora_ds.train.lifetime.requests import STOPPED, say

LOST_CONTACT = 7
"""Exit code of a rank that ends because of another one; see `errors.CollectiveTimeoutError`."""

How = Literal["failed", "gone", "silent", "stuck"]
"""`failed`: with an error of its own. `gone`: ended without a word. `silent`: exists perhaps, but
does not answer. `stuck`: answers, but its main thread has not moved."""


@dataclass(frozen=True)
class Failure:
    """Why a run ended, as far as one rank is concerned.

    Args:
        rank: the first that failed.
        host: where it ran.
        pid: of its process.
        activity: what it was doing, in the words of `activity.current`.
        kind: class of its error, or how it was lost.
        message: what went wrong, in whole sentences; may have several lines.
        code: exit code of that rank; None if nobody knows it.
        how: how it ended.
        traceback: of an error that is not one of ours.
        ranks: all that ended in this way.
    """

    rank: int
    host: str
    pid: int
    activity: str
    kind: str
    message: str
    code: int | None
    how: How = "failed"
    traceback: str | None = None
    ranks: tuple[int, ...] = ()

    @property
    def line(self) -> str:
        """The root cause in one line."""
        first, *more = self.message.splitlines() or [self.kind]
        if more and self.kind == ConfigError.__name__:
            first, more = f"{len(more) + 1} mistakes, listed above", []
        rest = f" (and {len(more)} more lines, above)" if more else ""
        code = "" if self.code is None else f" (exit code {self.code})"
        return f"ROOT CAUSE rank {self.rank} ({self.activity}): {first}{rest}{code}"

    @property
    def culprits(self) -> tuple[int, ...]:
        """All ranks that ended in this way."""
        return self.ranks or (self.rank,)

    @property
    def code_of_others(self) -> int:
        """Exit code of ranks that end because of this."""
        return STOPPED if self.code == STOPPED else LOST_CONTACT

    def is_told_by_all(self, other: Failure) -> bool:
        """Whether another rank found the same, as all do where one has told them a verdict."""
        return (self.code, self.message) == (other.code, other.message)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Failure:
        """The failure that `asdict` described."""
        values: dict[str, Any] = dict(found)
        values["ranks"] = tuple(values["ranks"])
        return cls(**values)


def describe(error: BaseException, rank: int) -> Failure:
    """What an exception that nobody caught says of this rank."""
    ours = isinstance(error, ReloraError)
    kind = type(error).__name__
    text = str(error) if ours else f"{kind}: {error}"
    code = error.exit_code if ours else 1
    lines = None if ours else "".join(traceback.format_exception(error))
    where = origin(error)
    return Failure(
        rank, socket.gethostname(), os.getpid(), where, kind, _masked(text), code, traceback=lines
    )


def announce(failure: Failure, error: BaseException | None = None) -> None:
    """Print a failure of this rank; the root cause is the last line. For the main thread."""
    lines = []
    if failure.traceback is not None:
        lines.append(_masked(failure.traceback.rstrip()))
    elif isinstance(error, ConfigError) and len(error.problems) > 1:
        lines += [f"error: {_masked(problem)}" for problem in error.shown]
    elif "\n" in failure.message:
        lines.append(f"error: {failure.message}")
    text = "\n".join([*lines, failure.line, ""])
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        sys.stderr.write(text)
        sys.stderr.flush()


def note(text: str) -> None:
    """Write to this rank's log file alone."""
    record = logging.LogRecord(__name__, logging.ERROR, __file__, 0, text, None, None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def write_report(
    directory: Path, rank: int, failure: Failure, own_code: int, stacks: str | None
) -> None:
    """Write `error_rank_R.json` whole or not at all; a directory that is gone is no reason to fail.

    Args:
        directory: of the run's logs.
        rank: this one.
        failure: why it ends.
        own_code: exit code of this rank.
        stacks: of all its threads.
    """
    path = directory / f"error_rank_{rank}.json"
    content = {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "exit_code": own_code,
        "root_cause": asdict(failure),
        "stacks": stacks,
    }
    draft = path.with_suffix(".json.tmp")
    try:
        with open(draft, "w", encoding="utf-8", opener=open_own) as file:
            file.write(_masked(json.dumps(content, indent=2)) + "\n")
        os.replace(draft, path)
    except OSError as error:
        say(f"error: cannot write {path}: {error.strerror or error}")
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def remove_reports(directory: Path) -> None:
    """Remove what ranks of an earlier run have reported."""
    for path in directory.glob("error_rank_*.json"):
        path.unlink(missing_ok=True)


def _masked(text: str) -> str:
    return mask_values(text, secret_values(os.environ))
