"""What every file of tensors says of itself, so that files of several checkpoints cannot be mixed.

A checksum proves that a file is what the manifest says. A stamp proves that it is the file of this
name of this step of this run, also where somebody copied files about and wrote the manifest anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from relora_ds.engine.deepspeed.files import open_shard
from relora_ds.errors import CheckpointError

KEY = "relora_ds"
"""Where a pickled dictionary keeps its stamp."""


@dataclass(frozen=True)
class Origin:
    """Where a file of tensors comes from.

    Args:
        step: updates that its checkpoint holds.
        run: digest of what the checkpoint says of its run; see `RunRecord.origin`.
    """

    step: int
    run: str


def stamp(name: str, origin: Origin) -> dict[str, str]:
    """The stamp of a file.

    Args:
        name: of the file within its checkpoint.
        origin: of its checkpoint.
    """
    return {"file": name, "step": str(origin.step), "run": origin.run}


def check_stamp(path: Path, origin: Origin) -> None:
    """Make sure that a file of tensors belongs where it lies.

    Args:
        path: in a checkpoint; its name says how it is read.
        origin: of the checkpoint.

    Raises:
        CheckpointError: it cannot be read, has no stamp, or is of another name, step or run.
    """
    found, expected = _read(path), stamp(path.name, origin)
    if found == expected:
        return
    if not isinstance(found, Mapping):
        what = "does not say which file of which step it is"
    elif found.get("file") == path.name and found.get("step") == str(origin.step):
        what = "was written by another run or with other settings"
    else:
        what = f"says that it is {found.get('file')} of step {found.get('step')}"
    raise CheckpointError(
        f"{path}: {what}, but is to be {path.name} of step {origin.step} of its run: files of "
        "several checkpoints were mixed; use another checkpoint"
    )


def _read(path: Path) -> Any:
    if path.suffix == ".pt":
        return open_shard(path).get(KEY)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata()
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use another one") from error
