"""Files that are on disk before anybody is told of them.

A file is written, hashed on its way and forced to disk; a name changes from one content to another
in one step; a directory is forced to disk after names in it changed, since a machine that stops
may otherwise forget the change.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from relora_ds.files.regular import open_own

_CHUNK = 4 << 20  # bytes that are written and hashed at a time
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD, and a flag of renameat2(2)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Written:
    """What was written to a file.

    Args:
        bytes: its size.
        sha256: of its content, as lower-case hexadecimal.
    """

    bytes: int
    sha256: str


class OutputFile:
    """A new file; hashes what is written to it. `torch.save` takes it for a stream.

    Args:
        path: an existing file is replaced; a link is not followed.
        on_progress: called after each few megabytes; what it raises ends the writing.

    Raises:
        OSError: it cannot be opened; carries the path, as do the errors of all methods.
    """

    def __init__(self, path: Path, on_progress: Callable[[], None] | None = None) -> None:
        self.path = path
        self.size = 0
        self.error: OSError | None = None
        """The first one: a library that writes may hide it behind words of its own."""
        self._on_progress = on_progress
        self._digest = hashlib.sha256()
        self._descriptor = open_own(path, os.O_WRONLY | os.O_TRUNC)

    def write(self, content: bytes | memoryview) -> int:
        """Append all of `content`; returns its length in bytes."""
        rest = memoryview(content).cast("B")
        total = len(rest)
        while rest:
            chunk = rest[:_CHUNK]
            with self._naming():
                done = os.write(self._descriptor, chunk)
            self._digest.update(chunk[:done])
            self.size += done
            rest = rest[done:]
            if self._on_progress is not None:
                self._on_progress()
        return total

    def flush(self) -> None:
        """Nothing: no byte waits in a buffer."""

    def finish(self) -> Written:
        """Force everything to disk."""
        with self._naming():
            os.fsync(self._descriptor)
        return Written(self.size, self._digest.hexdigest())

    def close(self) -> None:
        """Let go of the file. Again does nothing."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with self._naming():
                os.close(descriptor)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Errors of the operating system with the file that they are about."""
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            self.error = self.error or error
            raise


def write_file(
    path: Path,
    fill: Callable[[OutputFile], object],
    on_progress: Callable[[], None] | None = None,
) -> Written:
    """Write a file and force it to disk.

    Args:
        path: an existing file is replaced; a reader may see half of the new one meanwhile.
        fill: writes the content.
        on_progress: called after each few megabytes; what it raises ends the writing.

    Raises:
        OSError: the file cannot be written.
    """
    file = OutputFile(path, on_progress)
    try:
        fill(file)
        return file.finish()
    except Exception as error:
        if file.error is not None and error is not file.error:
            raise file.error from error
        raise
    finally:
        with contextlib.suppress(OSError):  # after an error there is nothing left to lose
            file.close()


def sync_directory(path: Path) -> None:
    """Force the names in a directory to disk.

    Raises:
        OSError: they cannot be.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems have no such call for directories, and no need of it
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            error.filename = str(path)
            raise
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Give two files or directories each other's name in one step.

    Returns:
        Whether it was done; not every file system can.
    """
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    if call is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    return call(_HERE, paths[0], _HERE, paths[1], _RENAME_EXCHANGE) == 0


def sync_tree(path: Path) -> None:
    """Force every file and every name below a directory to disk.

    Raises:
        OSError: they cannot be.
    """
    for folder, _, names in os.walk(path):
        for name in names:
            descriptor = os.open(Path(folder, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory, if there is one.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_out_of_space(error: OSError) -> bool:
    """Whether the disk or a quota is full."""
    return error.errno in _NO_SPACE


def remedy(error: OSError) -> str:
    """What a user can do about a file that cannot be written."""
    if is_out_of_space(error):
        return "free some space there, or raise the quota"
    if error.errno in _NO_PERMISSION:
        return "make the directory writable for this user, or name another one"
    return "check that file system"


def describe(error: OSError) -> str:
    """What the operating system refused, and for which file, as "a/b: No space left on device"."""
    reason = error.strerror or str(error) or type(error).__name__
    # of a copy that does not fit both files are named, where it comes from first
    name = (is_out_of_space(error) and error.filename2) or error.filename
    return f"{name}: {reason}" if name else reason
