"""Opening files that somebody else named, or that may be somebody else's by now.

A name may lead to a pipe, a device or a directory, and opening those can block for ever, act on
hardware, or never end. Everything that cannot be read is one kind of error here: an `OSError` whose
`strerror` says why in words that fit behind "cannot be read: ".
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "it is a directory"),
    (stat.S_ISFIFO, "it is a pipe, not a regular file"),
    (stat.S_ISSOCK, "it is a socket, not a regular file"),
    (stat.S_ISCHR, "it is a device, not a regular file"),
    (stat.S_ISBLK, "it is a device, not a regular file"),
)


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading; nothing else is ever opened.

    Raises:
        OSError: it does not exist, is not a regular file, may not be read, or has no possible name.
    """
    name = os.fspath(path)
    try:
        _check_kind(os.stat(name), name)
        # without blocking: between the two looks somebody may have put a pipe in its place
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, f"no file can have this name ({error})", name) from None
    stream = os.fdopen(descriptor, "rb")
    try:
        _check_kind(os.fstat(descriptor), name)
    except OSError:
        stream.close()
        raise
    return stream


def read_regular(path: str | Path, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes.

    Raises:
        OSError: see `open_regular`; or the file is larger.
    """
    with open_regular(path) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes", os.fspath(path))
    return content


def open_own(path: str | Path, flags: int) -> int:
    """Open a file of the program's own for writing, made if it is missing; an `opener` of `open`.

    A link is not followed, so that what it leads to is not overwritten, and a pipe not waited for.

    Args:
        flags: of `os.open`, such as `os.O_RDWR`.

    Returns:
        Its descriptor.

    Raises:
        OSError: it cannot be opened, or is anything else than a regular file.
    """
    name = os.fspath(path)
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(name)
        if stat.S_ISLNK(status.st_mode):
            raise OSError(errno.ELOOP, "it is a link, and may lead to a file of others", name)
        _check_kind(status, name)
    # between the two looks somebody may have put something else in its place
    never = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags | os.O_CREAT | never, 0o666)
    try:
        _check_kind(os.fstat(descriptor), name)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_kind(status: os.stat_result, name: str) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((words for is_kind, words in _KINDS if is_kind(status.st_mode)), "it is no file")
    raise OSError(errno.EINVAL, kind, name)
