"""Where a checkpoint that is written anew goes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relora_ds.checkpoint.format.manifest import write_manifest
from relora_ds.errors import CheckpointError
from relora_ds.files.durable import describe, remedy
from relora_ds.files.scratch import new_directory


def taken(output: Path) -> str | None:
    """Why nothing can be written to a place, in words; None if nothing is there."""
    return f"{output} exists: name a new directory" if os.path.lexists(output) else None


@contextmanager
def new_checkpoint(output: Path) -> Iterator[Path]:
    """An empty folder to fill, which gets a manifest and becomes `output` at the end of the block.

    It appears complete or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with new_directory(output) as directory:
            yield directory
            write_manifest(directory)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {output} cannot be written: {describe(error)}; {remedy(error)}"
        ) from error
