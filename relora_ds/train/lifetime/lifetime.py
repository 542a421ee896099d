"""The life of one process of a run: what it holds and watches, and the one way in which it ends.

The order of an ending that is no success is always the same, and here alone:

1. the cause is printed and written to `error_rank_R.json`, before anything that may fail or hang;
2. the others are told, without a collective;
3. the process leaves without a collective, with the exit code of the cause. A rank that ends
   because of another one leaves last, because a launcher returns the first code that it sees.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NoReturn

from relora_ds.activity import current, origin
from relora_ds.errors import (
    CheckpointError,
    CollectiveTimeoutError,
    ConfigError,
    DesyncError,
    DivergenceError,
    PreemptedError,
    ReloraError,
)
from relora_ds.launched import LaunchError, rank_or_first
from relora_ds.train.lifetime.failure import (
    Failure,
    announce,
    describe,
    note,
    remove_reports,
    write_report,
)
from relora_ds.train.lifetime.lock import OutputLock
from relora_ds.train.lifetime.peers import Address, Hub, Spoke
from relora_ds.train.lifetime.requests import StopRequests, listen, say
from relora_ds.train.lifetime.watch import Watch

_MARGIN_S = 30.0
"""By how much a rank is given up before a collective that waits for it is aborted by NCCL."""
_ANSWER_S = 1.0
"""For how long to ask who was first before speaking."""
_PRECEDENCE_S = 3.0
"""The deepspeed launcher looks once a second."""
_DRAIN_S = 2.0
"""How long to wait until all who are there know why the run ends."""
_LAST_WORDS_S = 20.0
"""How long a process that fails may go on to write its results."""
_GOODBYE_S = 30.0
"""How long the end of a process group may take after a success."""


class Lifetime:
    """What one process of a run holds until it ends."""

    def __init__(self) -> None:
        self.rank = rank_or_first(os.environ)
        self._watch: Watch | None = None
        self._lock: OutputLock | None = None
        self._logs: Path | None = None
        self._reason: str | None = None
        self._code: int | None = None
        self._ends_because_of_another = False
        self._announced: str | None = None
        self._last_line: str | None = None
        self._told, self._may_leave = threading.Event(), threading.Event()
        self._fails_itself = threading.Event()

    @property
    def requests(self) -> StopRequests:
        """Who asked this process to stop; it listens from the first look at the latest."""
        return listen()

    def watch_peers(self, world_size: int, timeout_minutes: float) -> None:
        """Begin to notice ranks that are lost or stuck. A collective call, once there is a group.

        Args:
            world_size: number of ranks.
            timeout_minutes: for how long a collective may take. A rank that says nothing, or does
                not move where it must, is given up 30 s before that, or a quarter if that is less.
        """
        from relora_ds.engine import distributed

        timeout_s = 60 * timeout_minutes
        limit_s = timeout_s - min(_MARGIN_S, timeout_s / 4)
        if self.rank == 0:
            watch = Hub(self.rank, limit_s, self._end_because_of, world_size)
            distributed.broadcast_object(watch.address)
        else:
            address: Address = distributed.broadcast_object(Address(0, ""))
            host = os.environ["MASTER_ADDR"]
            watch = Spoke(self.rank, limit_s, self._end_because_of, host, address)
        watch.start()
        self._watch = watch
        self.requests.on_leave = self._tell_of_request

    def hold(self, output_dir: Path) -> str | None:
        """Keep other runs out of a directory until the end. A collective call.

        Returns:
            What a user may want to know of an earlier holder; None if there was none.

        Raises:
            CheckpointError: on every rank: another run holds it; nothing was touched.
            ConfigError: on every rank: it cannot be written.
        """
        from relora_ds.engine import distributed

        problem: ReloraError | None = None
        notice: str | None = None
        if self.rank == 0:
            lock = OutputLock(output_dir, self._end_without_lock)
            try:
                notice = lock.take()
                self._lock = lock
                remove_reports(output_dir / "logs")
            except (CheckpointError, ConfigError) as error:
                problem = error
        problem = distributed.broadcast_object(problem)
        if problem is not None:
            raise problem
        self._logs = output_dir / "logs"
        return notice

    def close(self) -> None:
        """Watch and hold nothing any more: the run is over, and nothing can go wrong in it."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._release()

    def finish(self) -> None:
        """End in order, together with all other ranks."""
        from relora_ds.engine import distributed

        self.close()
        late = threading.Timer(_GOODBYE_S, self._leave, args=(0,))
        late.daemon = True
        late.start()
        distributed.stop()
        late.cancel()

    def report(self, error: BaseException) -> str:
        """Say why this rank fails, at once and once, and tell the others.

        To be called where a failure is first seen, before anything is cleaned up or written. The
        process ends soon afterwards, whatever that takes.

        Returns:
            Why the run ends.
        """
        if self._reason is not None:
            return self._reason
        failure = self._cause_of(error)
        self._reason = failure.message if failure.rank == self.rank else failure.line
        mine = failure.rank == self.rank
        if mine:
            self._fails_itself.set()
        self._code = (failure.code or 1) if mine else failure.code_of_others
        if self._watch is not None:
            # a verdict of all ranks leaves them time for a save that is under way
            agreed = isinstance(error, DesyncError | DivergenceError)
            words_s = max(_LAST_WORDS_S, self._watch.limit_s if agreed else 0.0)
            last = threading.Timer(words_s, self._leave, args=(self._code,))
            last.daemon = True
            last.start()
        if not mine:
            self._told.wait(_ANSWER_S)  # the thread that watches says it
            self._ends_because_of_another = True
            return self._reason
        if self._logs is not None:
            write_report(self._logs, self.rank, failure, self._code, None)
        note(failure.traceback or failure.message)
        at_once = self._watch is None or failure.traceback is not None
        if at_once:
            self._say(failure, error)
        if self._watch is not None:
            # of a verdict that all ranks find, the one speaks that rank 0 knew of first
            first = self._watch.publish(failure, _ANSWER_S)
            said_by_another = first.rank != self.rank and first.is_told_by_all(failure)
            if not at_once and not said_by_another:
                self._say(failure, error)
            self._announced = self._announced or first.line
        return self._reason

    def say_again(self) -> None:
        """Have the root cause, whoever announced it, stand last, behind what was said since."""
        self._last_line = self._last_line or self._announced

    def leave(self, error: BaseException) -> int:
        """End because of an exception.

        Returns:
            The exit code, if the process has not joined others and may end by itself.
        """
        self.report(error)
        code = 1 if self._code is None else self._code
        self._release()
        if self._watch is None and not _has_joined():
            return code
        if self._ends_because_of_another:
            self._may_leave.wait(_LAST_WORDS_S)
        elif self._watch is not None:
            self._watch.drain(_DRAIN_S)
        self._leave(code)
        return code

    def _say(self, failure: Failure, error: BaseException) -> None:
        # before ranks know each other, one rank per node speaks for a mistake that all find
        alone = isinstance(error, LaunchError) or not isinstance(error, ConfigError)
        if self._watch or alone or self.rank == 0 or os.environ.get("LOCAL_RANK", "0") == "0":
            announce(failure, error)
            self._announced = failure.line

    def _cause_of(self, error: BaseException) -> Failure:
        """What ended the run: this error, or the loss of a rank that made it."""
        from_outside = self._watch is not None and self._watch.cause()
        if not from_outside and _is_loss(error):
            from_outside = self._watch is not None and self._watch.cause(_PRECEDENCE_S)
            where = origin(error)
            error = CollectiveTimeoutError(
                "lost contact with another rank, or waited for it longer than "
                "train.timeout_minutes: it is dead, stuck, unreachable or took another path; see "
                f"logs/rank_*.log and resume ({error})"
            )
            error._activity = where  # pyright: ignore[reportAttributeAccessIssue]
        own = describe(error, self.rank)
        if not from_outside or from_outside.is_told_by_all(own):
            return own
        return from_outside

    def _end_because_of(self, cause: Failure) -> None:
        """End because of another rank, or a lack of progress; called on a thread."""
        if cause.how == "failed" and self._fails_itself.wait(_ANSWER_S):
            return  # all ranks find the same at about the same time, and say so
        self._code = cause.code_of_others
        waits = cause.how in ("failed", "gone")
        leave_at = time.monotonic() + (_PRECEDENCE_S if waits else 0.0)
        stacks = None if waits else _stacks()
        if self._logs is not None:
            write_report(self._logs, self.rank, cause, self._code, stacks)
        text = f"rank {self.rank} ends with exit code {self._code}; {cause.line}"
        note(text)
        if stacks is not None:
            say(f"stacks of rank {self.rank} in {current()!r}:\n{stacks}")
        if self._speaks_of(cause) and waits:
            say(f"rank {self.rank}: lost contact with another rank; {cause.line}")
        self._told.set()
        assert self._watch is not None
        self._watch.drain(_DRAIN_S)
        self._watch.end_silent()
        time.sleep(max(0.0, leave_at - time.monotonic()))
        if self._speaks_of(cause):
            self._last_line = text  # the main thread may have said this and that in the meantime
        self._may_leave.set()
        if self._reason is None:  # else the main thread is on its way, and a timer behind it
            self._release()
            self._leave(self._code)

    def _speaks_of(self, cause: Failure) -> bool:
        """One rank speaks for all that end because of another; where that is out of reach, more."""
        lost = () if cause.how == "stuck" else cause.culprits
        return self.rank == int(0 in lost) or os.environ.get("LOCAL_RANK") == "0"

    def _end_without_lock(self, reason: str) -> None:
        error = CheckpointError(f"{reason}: this run ends, and saves nothing more")
        self._logs = None
        self.report(error)
        self.leave(error)

    def _tell_of_request(self, reason: str) -> None:
        """Tell the others that this rank was asked to leave at once.

        A launcher asks the ranks that are left when one has failed: then the failure is the last
        that is said, not the request.
        """
        failure = describe(PreemptedError(reason), self.rank)
        if self._watch is not None:
            first = self._watch.publish(failure, _ANSWER_S)
            self._watch.drain(_ANSWER_S)
            if first.code != failure.code:
                say(f"rank {self.rank}: another rank had failed; {first.line}")
        self._release()

    def _release(self) -> None:
        """Give the lock back; a file system that hangs does not keep the process."""
        if self._lock is not None:
            releasing = threading.Thread(target=self._lock.release, daemon=True)
            releasing.start()
            releasing.join(2.0)

    def _leave(self, code: int) -> None:
        """End the process without talking to the others: process groups wait or abort then."""
        if self._last_line is not None:
            say(self._last_line)
        _exit(code)


def leave_process(code: int) -> NoReturn:
    """End a process that has nothing left to do, as soon as what it wrote is out.

    An interpreter that takes itself apart needs a second of a core for the libraries of a run, and
    a stopped run has none to lose.

    Args:
        code: its exit code.
    """
    atexit._run_exitfuncs()
    _exit(code)


def _exit(code: int) -> NoReturn:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(code)


def _is_loss(error: BaseException) -> bool:
    """Whether an error means that another process did not answer, or is no longer there."""
    if "torch" not in sys.modules or not isinstance(error, RuntimeError):
        return False
    from relora_ds.engine import distributed

    return distributed.lost_peers(error)


def _has_joined() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def _stacks() -> str:
    """The stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
