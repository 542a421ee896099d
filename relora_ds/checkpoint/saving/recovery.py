"""What killed saves left behind: finished where all ranks had agreed, removed otherwise."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from relora_ds.checkpoint.find import named_by_latest, read_pointer
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import is_complete
from relora_ds.files.durable import remove, sync_directory

_logger = logging.getLogger(__name__)


def recover(directory: Path) -> None:
    """Bring a directory of checkpoints to where `latest` names a complete one, if any is left.

    By one process, before anybody reads the directory, and only while nobody saves into it.

    Raises:
        OSError: something cannot be renamed or removed.
    """
    if not directory.is_dir():
        return
    _finish_publication(directory)
    _restore_named(directory)
    for path in (*layout.unfinished(directory), *layout.going(directory)):
        _logger.info("removing %s, which an interrupted save left", path)
        remove(path)


def _finish_publication(directory: Path) -> None:
    """Name in `latest` what was about to be named: it was complete then."""
    latest = directory / layout.LATEST
    pointer = layout.staging(latest)
    name = read_pointer(pointer)
    if name is None:
        remove(pointer)
        return
    final = directory / name
    staging = layout.staging(final)
    if not os.path.lexists(final) and is_complete(staging):
        staging.rename(final)
        sync_directory(directory)
    if not is_complete(final):
        remove(pointer)
        return
    _logger.info("naming %s in %s: it was complete when its save was interrupted", final, latest)
    os.replace(pointer, latest)
    sync_directory(directory)


def _restore_named(directory: Path) -> None:
    """Put back the checkpoint that `latest` names where a copy of it waits under another name."""
    name = named_by_latest(directory)
    if name is None or os.path.lexists(directory / name):
        return
    final = directory / name
    for copy in (layout.staging(final), layout.stale(final)):
        if is_complete(copy):
            _logger.info("restoring %s, whose save was interrupted", final)
            copy.rename(final)
            sync_directory(directory)
            return
