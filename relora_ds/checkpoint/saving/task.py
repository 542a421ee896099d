"""Work of a save in a thread of its own, while the main thread trains or answers other ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, NoReturn, TypeVar

import torch

from relora_ds.activity import doing
from relora_ds.checkpoint.saving.contents import Contents
from relora_ds.checkpoint.saving.problem import Problem
from relora_ds.files.durable import Written, write_file

T = TypeVar("T")
Files = Mapping[str, Written]
"""What was written, by name of the file."""


class CancelledError(Exception):
    """Another rank has failed: going on would be in vain."""


class Worker:
    """A thread that runs one task after the other, and ends with the process, whatever it waits
    for.

    Args:
        rank: this process, for what problems say.
        device: where the process computes.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._tasks: SimpleQueue[Task[Any]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], T]) -> Task[T]:
        """Have a function run."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="save", daemon=True)
            self._thread.start()
        task = Task(work, self._rank)
        self._tasks.put(task)
        return task

    @torch.no_grad()
    def _run(self) -> NoReturn:
        if self._device.type == "cuda":
            # a thread begins on the first GPU, and would take memory there that is another rank's
            torch.cuda.set_device(self._device)
        while True:
            self._tasks.get().run()


class Task(Generic[T]):
    """A function that is running, or has ended with a result or a problem; see `Worker.start`."""

    def __init__(self, work: Callable[[], T], rank: int) -> None:
        self._work: Callable[[], T] | None = work
        self._rank = rank
        self._future: Future[T] = Future()

    def run(self) -> None:
        """Run the function, and let go of what it holds."""
        assert self._work is not None, "a task runs once"
        try:
            result = self._work()
        except BaseException as error:  # whatever it is, all ranks must hear of it
            self._work = None
            self._future.set_exception(error)
        else:
            self._work = None
            self._future.set_result(result)

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._future.done()

    @property
    def failed(self) -> bool:
        """Whether it has ended with a problem."""
        return self.done and self._future.exception() is not None

    def wait(self, seconds: float) -> None:
        """Wait until it has ended, or for so long."""
        try:
            self._future.exception(timeout=seconds)
        except TimeoutError:
            return

    def result(self) -> T:
        """What it ended with, if it has not failed."""
        return self._future.result()

    def problem(self) -> Problem | None:
        """Why it has failed; None if it has not, or only because it was cancelled."""
        error = self._future.exception()
        if error is None or isinstance(error, CancelledError):
            return None
        return Problem.of(error, self._rank)


def write_contents(contents: Contents, directory: Path, cancelled: threading.Event) -> Files:
    """Write a rank's files, each on disk before the next is begun.

    Raises:
        OSError: a file cannot be written.
        CancelledError: `cancelled` was set.
    """

    def look() -> None:
        if cancelled.is_set():
            raise CancelledError

    written = {}
    for name, content in contents.items():
        with doing(f"save: {name}"):
            written[name] = write_file(directory / name, content.write, look)
    return written
