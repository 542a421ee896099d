"""Finding checkpoints: which directories are complete, and which one is the newest."""

from __future__ import annotations

import json
from pathlib import Path

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import is_complete
from relora_ds.errors import CheckpointError

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
    try:
        said = json.loads((path / layout.TRAINER).read_bytes())
        return isinstance(said, dict) and said.get("step") == step
    except (OSError, ValueError, RecursionError):
        return False


def named_by_latest(directory: Path) -> str | None:
    """The checkpoint's name that `latest` holds, whether there is one or not; None if none."""
    return read_pointer(directory / layout.LATEST)


def read_pointer(path: Path) -> str | None:
    """The name of a checkpoint in a file that holds one; None if it holds none."""
    try:
        with path.open("rb") as file:
            name = file.read(_POINTER_BYTES).decode().strip()
    except (OSError, ValueError):
        return None
    return name if layout.step_of(name) is not None else None


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint that `latest` names; None if there is none yet.

    Raises:
        CheckpointError: `latest` names something that is not a checkpoint beside it.
    """
    pointer = directory / layout.LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    path = directory / name
    if layout.step_of(name) is None or not path.is_dir():
        complete = [p.name for p in list_checkpoints(directory)]
        remedy = f"resume from {complete[-1]}" if complete else "no complete checkpoint is left"
        raise CheckpointError(
            f"{pointer}: names {name!r}, which is not a checkpoint in that directory; {remedy}"
        )
    return path


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
