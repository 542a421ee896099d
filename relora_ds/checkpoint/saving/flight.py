"""A save from its request to its end, and what is told of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Literal

from relora_ds.checkpoint.saving.contents import Contents
from relora_ds.checkpoint.saving.problem import Problem, size
from relora_ds.checkpoint.saving.snapshot import Snapshot
from relora_ds.checkpoint.saving.task import Task


@dataclass(frozen=True)
class SaveResult:
    """How a save ended.

    Args:
        step: of the checkpoint.
        path: its directory; None if it was not saved.
        problem: why it was not; None if it was.
        bytes: of all its files.
        seconds: from the request until it was named in `latest`.
        stall_seconds: how long training stood still for it, on the first rank.
    """

    step: int
    path: Path | None
    problem: str | None
    bytes: int
    seconds: float
    stall_seconds: float

    def figures(self) -> dict[str, float | int]:
        """Metrics of a successful save, by name."""
        return {
            "checkpoint/step": self.step,
            "checkpoint/bytes": self.bytes,
            "checkpoint/seconds": self.seconds,
            "checkpoint/stall_seconds": self.stall_seconds,
        }

    def __str__(self) -> str:
        return (
            f"saved to {self.path} ({size(self.bytes)} in {self.seconds:.2f} s, "
            f"training waited {self.stall_seconds:.2f} s)"
        )


@dataclass
class Flight:
    """A save that is under way.

    Args:
        step: of the checkpoint.
        task: what this rank is doing for it.
        cancelled: set once its files are no longer wanted.
        must_succeed: whether a failure ends the run whatever the settings say.
        snapshot: what training must wait for before it changes the state; None if nothing.
        needed: bytes of the checkpoint, estimated.
        free: bytes where it goes; None if nobody knows.
        stall_seconds: how long this rank has stood still for it.
        files: of all ranks, once they are written.
        problems: what went wrong, once something has.
    """

    step: int
    task: Task[Any]
    cancelled: Event
    must_succeed: bool
    started: float
    snapshot: Snapshot | None
    stage: Literal["copy", "write", "publish", "give up"] = "copy"
    needed: int = 0
    free: int | None = None
    stall_seconds: float = 0.0
    files: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class Ready:
    """What a rank is about to write.

    Args:
        contents: nothing changes them any more.
        bytes: of their tensors.
        free: bytes that are free where they go; None if unknown.
    """

    contents: Contents
    bytes: int
    free: int | None
