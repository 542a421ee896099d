"""Scratch folders beside the files that are being made, and the removal of those left behind.

A process that is killed cannot clean up, so the next one does. Whether the owner of a folder still
lives is told by a lock on a file in it: the system lets go of the lock when its owner dies, also
where the owner had the same process id as somebody else, or none that this host knows.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from relora_ds.files.durable import sync_directory, sync_tree

_OWNER = ".owner"
_DRAFT = ".owner.new"
# Not every network file system passes locks on to other hosts. There a folder that looks abandoned
# may be in use: it is removed when it is old.
_OLD_SECONDS = 24 * 3600


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent` that is removed at the end, and at the next start after a crash.

    Args:
        parent: exists.
        prefix: what names of such folders begin with. What others have called so stays.

    Raises:
        OSError: the folder cannot be made.
    """
    remove_leftovers(parent, prefix)
    with (
        tempfile.TemporaryDirectory(dir=parent, prefix=prefix, ignore_cleanup_errors=True) as name,
        _owned(Path(name)),
    ):
        yield Path(name)


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `target` at the end of the block, whole and on disk.

    Whatever is raised inside leaves nothing behind.

    Args:
        target: nothing is there, or an empty directory.

    Raises:
        OSError: it cannot be written, or something has come there meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target.parent, f".{target.name}.") as scratch:
        work = scratch / "new"
        work.mkdir()
        yield work
        sync_tree(work)
        work.rename(target)
    sync_directory(target.parent)


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove scratch folders of processes that are gone; what cannot be removed stays.

    Args:
        parent: folder that they lie in.
        prefix: what their names begin with.
    """
    for folder in sorted(parent.glob(f"{glob.escape(prefix)}*")):
        # a link was not made here, and what it leads to is somebody's
        if folder.is_dir() and not folder.is_symlink():
            with contextlib.suppress(OSError):
                _remove_if_abandoned(folder)


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Hold the lock that says that somebody works in `folder`."""
    draft = folder / _DRAFT
    with open(draft, "w") as stream:
        stream.write(f"{socket.gethostname()} {os.getpid()}\n")
        stream.flush()
        with contextlib.suppress(OSError):  # no locks here: then age alone decides
            fcntl.flock(stream, fcntl.LOCK_EX)
        os.replace(draft, folder / _OWNER)  # never there without its lock
        yield


def _remove_if_abandoned(folder: Path) -> None:
    owner = folder / _OWNER
    if not owner.exists():  # not yet; or somebody's, who happens to name folders like this
        if _is_old(folder):
            (folder / _DRAFT).unlink(missing_ok=True)
            folder.rmdir()  # which removes nothing that is in use
        return
    with open(owner) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        host = stream.readline().partition(" ")[0]
        if host == socket.gethostname() or _is_old(folder):
            # holding the lock: two that clean up at once do not meet
            shutil.rmtree(folder, ignore_errors=True)


def _is_old(folder: Path) -> bool:
    """Whether nothing in a folder has changed for a day."""
    newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    return time.time() - newest > _OLD_SECONDS
