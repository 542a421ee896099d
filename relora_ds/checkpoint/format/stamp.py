"""What every file of tensors says of itself, so that files of several checkpoints cannot be mixed.

A checksum proves that a file is what the manifest says. A stamp proves that it is the file of this
name of this step, also where somebody copied files about and wrote the manifest anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from relora_ds.engine.deepspeed.files import open_shard
from relora_ds.errors import CheckpointError

KEY = "relora_ds"
"""Where a pickled dictionary keeps its stamp."""


def stamp(name: str, step: int) -> dict[str, str]:
    """The stamp of a file.

    Args:
        name: of the file within its checkpoint.
        step: updates that the checkpoint holds.
    """
    return {"file": name, "step": str(step)}


def check_stamp(path: Path, step: int) -> None:
    """Make sure that a file of tensors belongs where it lies.

    Args:
        path: in a checkpoint; its name says how it is read.
        step: updates that the checkpoint holds.

    Raises:
        CheckpointError: it cannot be read, has no stamp, or is of another name or step.
    """
    found, expected = _read(path), stamp(path.name, step)
    if found == expected:
        return
    if not isinstance(found, Mapping):
        what = "does not say which file of which step it is"
    else:
        what = f"says that it is {found.get('file')} of step {found.get('step')}"
    raise CheckpointError(
        f"{path}: {what}, but is to be {path.name} of step {step}: files of several checkpoints "
        "were mixed; use another checkpoint"
    )


def _read(path: Path) -> Any:
    if path.suffix == ".pt":
        return open_shard(path).get(KEY)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata()
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use another one") from error
