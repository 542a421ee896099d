"""Files of named tensors: the one way in which a checkpoint's own ones are written and read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from relora_ds.checkpoint.format.stamp import Origin, stamp
from relora_ds.errors import CheckpointError
from relora_ds.files.tensors import write_safetensors


def split_tensors(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Values that go into `trainer.json`, and those that are tensors and go into a file."""
    tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
    return {key: value for key, value in values.items() if key not in tensors}, tensors


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, origin: Origin) -> None:
    """Write tensors of any device and layout; the same arguments give the same bytes.

    Args:
        path: in the directory of a checkpoint.
        origin: of the checkpoint.

    Raises:
        OSError: the file cannot be written.
    """
    write_safetensors(path, tensors, stamp(path.name, origin))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file by name, on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from error


def open_tensors(path: Path) -> Any:
    """A file whose tensors are read, whole or in slices, when they are asked for (`safe_open`).

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error}); use another checkpoint")
