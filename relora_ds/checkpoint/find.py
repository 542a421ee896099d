"""Finding checkpoints: which directories are complete, and which one is the newest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import is_complete
from relora_ds.errors import CheckpointError
from relora_ds.files.objects import read_object
from relora_ds.files.regular import read_regular

_POINTER_BYTES = 100  # more than any name of a checkpoint has


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints below `directory`, oldest first; contents are not read.

    An empty directory, a file, a copy under another step's name or one without a manifest is none.
    """
    steps = {path: layout.step_of(path.name) for path in directory.glob("*")}
    found = {path: step for path, step in steps.items() if step is not None}
    complete = [path for path, step in found.items() if is_complete(path) and _is_of(path, step)]
    return sorted(complete, key=found.__getitem__)


def _is_of(path: Path, step: int) -> bool:
    """Whether a checkpoint says of itself that it is of this step."""
    return (read_object(path / layout.TRAINER) or {}).get("step") == step


def named_by_latest(directory: Path) -> str | None:
    """The checkpoint's name that `latest` holds, whether there is one or not; None if none."""
    return read_pointer(directory / layout.LATEST)


def read_pointer(path: Path) -> str | None:
    """The name of a checkpoint in a file that holds one; None if it holds none."""
    try:
        name = read_regular(path, _POINTER_BYTES).decode().strip()
    except (OSError, ValueError):
        return None
    return name if layout.step_of(name) is not None else None


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint that `latest` names; None if there is none yet.

    Raises:
        CheckpointError: `latest` names something that is not a checkpoint beside it, is damaged, or
            is missing where complete checkpoints are.
    """
    pointer = directory / layout.LATEST
    name = read_pointer(pointer)
    if name is not None and (directory / name).is_dir():
        return directory / name
    complete = list_checkpoints(directory)
    if name is not None:
        problem = f"names {name!r}, which is not a checkpoint in that directory"
    elif os.path.lexists(pointer):
        problem = "is damaged: it names no checkpoint"
    elif complete:
        problem = "is missing beside complete checkpoints"
    else:
        return None
    raise CheckpointError(f"{pointer}: {problem}; {remedy(complete[-1:])}")


def remedy(complete: Sequence[Path]) -> str:
    """What to do where a checkpoint cannot be used.

    Args:
        complete: the one to use in its place, if there is one.
    """
    if not complete:
        return "no complete checkpoint is left: start anew with checkpoint.resume=false"
    return (
        f"{complete[0]} is complete: resume from it with checkpoint.resume={complete[0]}, or let "
        "checkpoint.fallback=true take it"
    )


def find_checkpoint(path: Path) -> Path:
    """A checkpoint given as `step_N`, as the directory that holds `latest`, or as a run directory.

    Raises:
        CheckpointError: there is none.
    """
    if (path / layout.TRAINER).is_file():
        return path
    for directory in (path, path / layout.CHECKPOINTS):
        found = latest_checkpoint(directory)
        if found is not None:
            return found
    raise CheckpointError(
        f"{path}: no checkpoint here; give a directory step_N, or the one that holds 'latest'"
    )
