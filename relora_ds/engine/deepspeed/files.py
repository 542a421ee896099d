"""Reading DeepSpeed's files of a checkpoint without an engine; only tensors are unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from relora_ds.errors import CheckpointError

_MODEL = "zero_pp_rank_{}_mp_rank_{:02d}_model_states.pt"
_OPTIMIZER = "*zero_pp_rank_{}_mp_rank_{:02d}_optim_states.pt"


def model_file(tensor_rank: int) -> str:
    """Name of the file that holds a tensor-parallel rank's model, at stages 0 to 2."""
    return f"mp_rank_{tensor_rank:02d}_model_states.pt"


def load_whole_model(directory: Path, tensor_rank: int) -> dict[str, Any]:
    """What a tensor-parallel rank holds of the model, at stages 0 to 2."""
    return load_shard(directory / model_file(tensor_rank))


def load_model_states(directory: Path, rank: int, tensor_rank: int) -> dict[str, Any]:
    """A data-parallel rank's slices of that, at stage 3."""
    return load_shard(directory / _MODEL.format(rank, tensor_rank))


def load_optimizer_states(directory: Path, rank: int, tensor_rank: int) -> dict[str, Any]:
    """A rank's part of masters and moments, at stages 1 to 3."""
    found = list(directory.glob(_OPTIMIZER.format(rank, tensor_rank)))
    if len(found) != 1:
        raise CheckpointError(
            f"{directory}: holds {len(found)} optimizer shards of rank {rank} instead of one; copy "
            "the whole checkpoint or use another one"
        )
    return load_shard(found[0])["optimizer_state_dict"]


def load_shard(path: Path) -> dict[str, Any]:
    """What is in a file; its tensors are read when they are used.

    Raises:
        CheckpointError: it cannot be read, or holds something else than tensors and containers.
    """
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use another one") from error
