"""Which checkpoints stay: the newest of this run's own line, and nothing of an abandoned one."""

from __future__ import annotations

from pathlib import Path

from relora_ds.checkpoint.find import list_checkpoints, named_by_latest
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.saving.publish import discard, point_to
from relora_ds.files.durable import sync_directory


def prune(newest: Path, keep: int, spared: int | None = None) -> None:
    """Remove complete checkpoints before `newest` until `keep` are left with it.

    What is no complete checkpoint neither counts nor is removed.

    Args:
        spared: step of a checkpoint that stays whatever its age, and is not counted.
    """
    step = layout.step_of(newest.name)
    assert step is not None, "it was just saved"
    steps = {path: layout.step_of(path.name) or 0 for path in list_checkpoints(newest.parent)}
    older = [path for path, own in steps.items() if own < step and own != spared]
    for path in older[: max(0, len(older) + 1 - keep)]:
        discard(path)


def abandon_later(directory: Path, source: Path, step: int) -> Path | None:
    """Move aside the checkpoints of a run that are not of the line that goes on from `source`.

    A run that goes on from one of its own checkpoints keeps those before it. One that goes on from
    elsewhere keeps none.

    Args:
        directory: of the run's checkpoints.
        source: the checkpoint that it goes on from.
        step: of that checkpoint.

    Returns:
        Where they are now, in a `previous_N` beside `directory`; None if there were none.

    Raises:
        OSError: they cannot be moved.
    """
    own = source.resolve().parent == directory.resolve()
    found = list_checkpoints(directory)
    gone = [path for path in found if not own or (layout.step_of(path.name) or 0) > step]
    if own and named_by_latest(directory) != source.name:
        point_to(directory / source.name)
    if not gone:
        return None
    if not own:
        (directory / layout.LATEST).unlink(missing_ok=True)  # a kill leaves no name of nothing
        sync_directory(directory)
    target = unused_previous(directory.parent) / layout.CHECKPOINTS
    target.mkdir(parents=True)
    for path in gone:
        path.rename(target / path.name)
    return target


def unused_previous(output_dir: Path) -> Path:
    """The first of `previous_1`, `previous_2`, ... that does not exist."""
    number = 1
    while (output_dir / f"previous_{number}").exists():
        number += 1
    return output_dir / f"previous_{number}"
