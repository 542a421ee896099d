"""Replacing a file in one step, so that no reader ever sees half of it."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
from pathlib import Path

from relora_ds.files.regular import open_own, open_regular


def write_atomically(path: Path, content: bytes) -> None:
    """Give `path` exactly `content`, through a temporary file in the same directory.

    The content is on disk before the name points to it: neither a crash of the process nor of the
    machine leaves a partial file under `path`. What a killed process has left of an attempt is
    removed by the next one.

    Raises:
        OSError: the directory cannot be written; an earlier file at `path` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_drafts(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=open_own) as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_drafts(path: Path) -> None:
    """Remove temporary files of processes that have ended: the system has let go of their locks."""
    for draft in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if not draft.name.split(".")[-2].isdigit():  # no process's number: somebody's file
            continue
        with contextlib.suppress(OSError), open_regular(draft) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.unlink()
