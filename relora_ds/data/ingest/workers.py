"""Shares of a corpus encoded by several processes, and handed over in their order.

A worker holds one end of a pipe and nothing else of its parent: when the parent is gone, however it
ended, the next message finds the pipe closed and the worker leaves.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from relora_ds.data.ingest.encode import Part, encode
from relora_ds.data.ingest.texts import Share
from relora_ds.data.tokenizer import AnyTokenizer, open_tokenizer
from relora_ds.errors import DataError


class _Task(NamedTuple):
    """A share, and where its ids go."""

    number: int
    share: Share
    path: Path


class _Failure(NamedTuple):
    """Why a share could not be encoded, in words."""

    message: str


_Message = tuple[int, int | Part | _Failure]
"""Number of a share, and how much more of it was read, or what became of it."""


def encode_shares(
    shares: Sequence[Share],
    tokenizer_path: str | Path,
    dtype: np.dtype[np.generic],
    folder: Path,
    workers: int,
    advance: Callable[[int], None],
) -> Generator[Part, None, None]:
    """The parts of all shares, in their order, whichever is ready first.

    Args:
        shares: what to encode.
        tokenizer_path: of the tokenizer.
        dtype: type of one id.
        folder: where parts are written; the caller removes each when it has read it.
        workers: processes.
        advance: called with how much more was read.

    Raises:
        DataError: a share cannot be used: the first one in order, as if they were read one by one.
            Or a worker was killed.
    """
    tasks = deque(_Task(n, share, folder / f"part-{n}") for n, share in enumerate(shares))
    ready: dict[int, Part | _Failure] = {}
    with _Workers(min(workers, len(shares)), str(tokenizer_path), dtype.str) as pool:
        for number in range(len(shares)):
            while number not in ready:
                pool.give(tasks)
                for done, outcome in pool.receive():
                    if isinstance(outcome, int):
                        advance(outcome)
                        continue
                    ready[done] = outcome
                    if isinstance(outcome, _Failure):
                        tasks.clear()  # all that are left come behind it
            outcome = ready.pop(number)
            if isinstance(outcome, _Failure):
                raise DataError(outcome.message)
            yield outcome


class _Workers:
    """Processes that encode shares, ended with the context.

    Args:
        count: how many.
        tokenizer_path: of the tokenizer.
        dtype: NumPy name of the type of one id.
    """

    def __init__(self, count: int, tokenizer_path: str, dtype: str) -> None:
        # a fresh interpreter: a fork would copy the threads' locks of Arrow and of the progress bar
        context = multiprocessing.get_context("spawn")
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        self._tasks: dict[Connection, _Task | None] = {}
        self._processes: dict[Connection, BaseProcess] = {}
        for _ in range(count):
            ours, theirs = context.Pipe()
            arguments = (theirs, tokenizer_path, dtype, threads)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that its death closes the pipe
            self._tasks[ours] = None
            self._processes[ours] = process

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._processes.items():
            process.terminate()
            process.join()
            connection.close()

    def give(self, tasks: deque[_Task]) -> None:
        """Give every idle worker one of the tasks that are left."""
        for connection, current in self._tasks.items():
            if current is None and tasks:
                self._tasks[connection] = tasks.popleft()
                with contextlib.suppress(BrokenPipeError):  # found when it is asked for the result
                    connection.send(self._tasks[connection])

    def receive(self) -> Iterator[_Message]:
        """What workers have to say, as soon as one of them has.

        Raises:
            DataError: a worker is gone.
        """
        busy = [connection for connection, task in self._tasks.items() if task is not None]
        for ready in wait(busy):
            connection = cast(Connection, ready)
            task = self._tasks[connection]
            assert task is not None
            try:
                message: int | Part | _Failure = connection.recv()
            except (EOFError, ConnectionResetError) as error:
                raise self._lost(connection, task) from error
            if not isinstance(message, int):
                self._tasks[connection] = None
            yield task.number, message

    def _lost(self, connection: Connection, task: _Task) -> DataError:
        process = self._processes[connection]
        process.join()
        code = process.exitcode or 0
        if code < 0:
            name = signal.Signals(-code).name
            how = f"was ended by {name}; if memory is short, use fewer --workers"
        else:
            how = f"left with code {code}; its own words stand above"
        return DataError(f"{task.share}: the worker that read it {how}")


def _work(connection: Connection, tokenizer_path: str, dtype: str, threads: int) -> None:
    """The life of a worker: encode what comes, until the parent ends it or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends its workers
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the package tokenizers, before its import
    tokenizer = open_tokenizer(tokenizer_path, threads)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task: _Task = connection.recv()
            try:
                outcome: Part | _Failure = _encoded(task, tokenizer, np.dtype(dtype), connection)
            except DataError as error:
                outcome = _Failure(str(error))
            except (BrokenPipeError, ConnectionResetError):
                return
            except OSError as error:
                outcome = _Failure(f"{task.path}: cannot be written: {error.strerror or error}")
            connection.send(outcome)


def _encoded(
    task: _Task,
    tokenizer: AnyTokenizer,
    dtype: np.dtype[np.generic],
    connection: Connection,
) -> Part:
    reader = task.share.open()
    lengths: list[int] = []
    bounds: list[int] = []
    largest = position = 0
    with open(task.path, "wb") as stream:
        for batch in encode(reader.pieces(), tokenizer, dtype):
            stream.write(batch.tokens.tobytes())
            bounds += [len(lengths) + bound for bound in batch.bounds]
            lengths += batch.lengths
            largest = max(largest, int(batch.tokens.max(initial=0)))
            connection.send(reader.position - position)
            position = reader.position
    connection.send(reader.position - position)
    indices = np.array(lengths, np.int32), np.array(bounds, np.int64)
    return Part(task.path, *indices, largest, reader.skipped)
