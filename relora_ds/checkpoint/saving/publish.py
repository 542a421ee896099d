"""From written files to the newest checkpoint, by the first rank alone.

The order makes a machine that stops at any moment leave either the checkpoint before or this one.
`latest.tmp` names the checkpoint from before its directory gets its name until `latest` does: who
finds both knows that all ranks had agreed, and finishes what was begun (`recovery`).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from relora_ds.activity import doing
from relora_ds.checkpoint.find import list_checkpoints, named_by_latest
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import encode_manifest, is_complete
from relora_ds.checkpoint.saving.task import Files
from relora_ds.files.durable import remove, sync_directory, write_file

_logger = logging.getLogger(__name__)


def begin(staging: Path) -> None:
    """Make an empty directory for a checkpoint that is to be written.

    Raises:
        OSError: it cannot be made.
    """
    staging.parent.mkdir(parents=True, exist_ok=True)
    remove(staging)
    staging.mkdir()


def publish(staging: Path, final: Path, files: Files) -> None:
    """Give a written checkpoint its name, and name it in `latest`.

    Args:
        staging: holds the files.
        final: the checkpoint's directory; what is there is moved aside.
        files: all files of all ranks.

    Raises:
        OSError: it cannot be done; the checkpoint before is still the latest.
    """
    manifest = encode_manifest(files)
    with doing("save: manifest"):
        write_file(staging / layout.MANIFEST, lambda file: file.write(manifest))
        sync_directory(staging)
    with doing("save: rename"):
        pointer = layout.staging(final.parent / layout.LATEST)
        remove(pointer)
        write_file(pointer, lambda file: file.write(final.name.encode()))
        aside = _make_room(final)
        try:
            staging.rename(final)
        except OSError:
            if aside is not None:
                aside.rename(final)
            raise
        sync_directory(final.parent)
    with doing("save: latest"):
        os.replace(pointer, final.parent / layout.LATEST)
        try:
            sync_directory(final.parent)
        except OSError as error:  # everybody sees the new name by now: the save did not fail
            _logger.warning("%s may be forgotten if the machine stops (%s)", final, error.strerror)
    if aside is not None and aside == layout.stale(final):
        discard(aside)


def give_up(staging: Path) -> None:
    """Remove what was written of a checkpoint that failed, so that the disk is not left full."""
    with doing("save: give up"):
        for path in (staging, layout.staging(staging.parent / layout.LATEST)):
            try:
                remove(path)
            except OSError as error:
                _logger.warning("%s cannot be removed (%s)", path, error.strerror)


def point_to(checkpoint: Path) -> None:
    """Name a complete checkpoint in the `latest` beside it.

    Raises:
        OSError: it cannot be written; `latest` is as before.
    """
    latest = checkpoint.parent / layout.LATEST
    pointer = latest.with_name(f".{layout.LATEST}.{os.getpid()}")
    try:
        write_file(pointer, lambda file: file.write(checkpoint.name.encode()))
        os.replace(pointer, latest)
        sync_directory(latest.parent)
    finally:
        pointer.unlink(missing_ok=True)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; one that is half removed is never taken for a whole one."""
    going = layout.stale(checkpoint) if layout.step_of(checkpoint.name) is not None else checkpoint
    try:
        if going != checkpoint:
            remove(going)
            checkpoint.rename(going)
        remove(going)
    except OSError as error:
        _logger.warning("%s cannot be removed (%s)", checkpoint, error.strerror)


def _make_room(final: Path) -> Path | None:
    """Move aside what has the name of a new checkpoint; returns where it is now."""
    if not os.path.lexists(final):
        return None
    others = [path for path in list_checkpoints(final.parent) if path != final]
    if named_by_latest(final.parent) == final.name and others:
        point_to(others[-1])  # or a kill would leave the name of nothing
    aside = layout.stale(final) if is_complete(final) else _unused(layout.stray(final))
    remove(layout.stale(final))
    final.rename(aside)
    return aside


def _unused(path: Path) -> Path:
    found, number = path, 1
    while os.path.lexists(found):
        found, number = path.with_name(f"{path.name}_{number}"), number + 1
    return found
