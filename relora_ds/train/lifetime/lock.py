"""A lock on an output directory, so that two runs never write into one.

The file names who holds it and carries a count that its holder raises every few seconds. Three
facts decide, and none of them is a clock of another machine:

* the system's lock on the open file, which ends with its process however that ends. Where a file
  system shares it between machines, it decides alone;
* on the holder's machine, whether its process is alive;
* from other machines, whether the count grows while one looks on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from relora_ds.errors import CheckpointError, ConfigError
from relora_ds.files.regular import open_own, read_regular
from relora_ds.train.lifetime.link import Identity

NAME = "run.lock"
BEAT_S = 5.0
"""How often a holder raises its count."""
PATIENCE_S = 30.0
"""After how long without a higher count a holder on another machine counts as dead."""
_RECORD_BYTES = 1024
"""The record has one size, so that no reader ever meets half of it."""
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Args:
        who: the process.
        since: when it took the lock, on its own clock.
        token: of this taking.
        count: how often it has shown that it is alive.
    """

    who: Identity
    since: str
    token: str
    count: int = 0

    def __str__(self) -> str:
        return f"process {self.who.pid} on {self.who.host} since {self.since}"


class OutputLock:
    """The lock of one directory, for one process.

    Args:
        directory: is created.
        on_loss: called on a thread with a sentence if another process has taken the lock over,
            which happens to a holder that was stopped for longer than the patience of others.
        beat_s: see `BEAT_S`.
        patience_s: see `PATIENCE_S`.
    """

    def __init__(
        self,
        directory: Path,
        on_loss: Callable[[str], None],
        beat_s: float = BEAT_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.path = directory / NAME
        self._on_loss = on_loss
        self._beat_s, self._patience_s = beat_s, patience_s
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self._holder = Holder(Identity.own(0), since, secrets.token_hex(8))
        self._file: int | None = None
        self._released = threading.Event()

    def take(self) -> str | None:
        """Take the lock.

        Returns:
            What a user may want to know: whose lock was taken over; None if it was free.

        Raises:
            CheckpointError: another run holds it.
            ConfigError: the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open_and_lock()
            earlier = self._earlier_holder(self._file)
            self._write(self._file)
        except OSError as error:
            raise ConfigError(
                f"cannot write {self.path}: {error.strerror}; choose an output_dir that can be "
                "written"
            ) from error
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return None if earlier is None else f"{self.path}: left behind by {earlier}, which is dead"

    def release(self) -> None:
        """Give the lock back. Nothing happens where it is not held."""
        self._released.set()
        if self._file is not None:
            with contextlib.suppress(OSError):
                if self._read(self._file) == self._holder:
                    self.path.unlink(missing_ok=True)  # before the file is unlocked: see below
                os.close(self._file)
            self._file = None

    def _open_and_lock(self) -> int:
        """The open file, locked by this process.

        A holder removes the file when it is done. Who had opened that file before has a lock on
        nothing, and begins again.
        """
        while True:
            file = open_own(self.path, os.O_RDWR)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    holder = self._read(file)
                    os.close(file)
                    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                        raise self._refusal(holder) from None
                    raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(self.path)):
                    return file
            os.close(file)

    def _earlier_holder(self, file: int) -> Holder | None:
        """Who has left the lock behind.

        Raises:
            CheckpointError: it is alive.
        """
        earlier = self._read(file)
        if earlier is None:
            return None
        here = earlier.who.machine == self._holder.who.machine
        if earlier.who.is_alive() or (not here and self._grows(file)):
            os.close(file)
            self._file = None
            raise self._refusal(earlier)
        return earlier

    def _grows(self, file: int) -> bool:
        """Whether a holder shows that it is alive while we look on, on our own clock."""
        first, deadline = self._read(file), time.monotonic() + self._patience_s
        while time.monotonic() < deadline:
            time.sleep(min(0.5, self._patience_s / 10))
            if self._read_anew() != first:
                return True
        return False

    def _refusal(self, holder: Holder | None) -> CheckpointError:
        who = "a process that has not said who it is" if holder is None else str(holder)
        return CheckpointError(
            f"{self.path.parent}: another run writes there: {who}; end it or wait for it, or "
            "choose another output_dir"
        )

    def _beat(self) -> None:
        count = 0
        while not self._released.wait(self._beat_s):
            found = None
            with contextlib.suppress(OSError):  # a file system that is away may come back
                found = self._read_anew()
            if found is not None and found.token != self._holder.token:
                self._on_loss(f"{self.path}: taken over by {found} while this run was stopped")
                return
            count += 1
            with contextlib.suppress(OSError):
                if self._file is not None and not self._released.is_set():
                    self._holder = replace(self._holder, count=count)
                    self._write(self._file)

    def _write(self, file: int) -> None:
        os.pwrite(file, json.dumps(asdict(self._holder)).encode().ljust(_RECORD_BYTES), 0)

    def _read(self, file: int) -> Holder | None:
        return _parse(os.pread(file, _RECORD_BYTES, 0))

    def _read_anew(self) -> Holder | None:
        """The record by a new opening: only that looks past a network file system's cache."""
        try:
            return _parse(read_regular(self.path, _RECORD_BYTES))
        except FileNotFoundError:
            return None


def _parse(content: bytes) -> Holder | None:
    """The record; None where there is none, or where a crash left something else."""
    try:
        found: dict[str, Any] = json.loads(content)
        who = Identity(**found["who"])
        return Holder(who, found["since"], found["token"], found["count"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
