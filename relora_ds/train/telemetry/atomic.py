"""Replacing a file in one step, so that no reader ever sees half of it."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Give `path` exactly `content`, through a temporary file in the same directory.

    The content is on disk before the name points to it: neither a crash of the process nor of the
    machine leaves a partial file under `path`.

    Raises:
        OSError: the directory cannot be written; an earlier file at `path` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
