"""Reading the shards of a ZeRO stage 3 checkpoint without an engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from relora_ds.errors import CheckpointError

_MODEL = "zero_pp_rank_{}_mp_rank_{:02d}_model_states.pt"
_OPTIMIZER = "*zero_pp_rank_{}_mp_rank_{:02d}_optim_states.pt"
_WHOLE = "mp_rank_{:02d}_model_states.pt"


def is_cut(directory: Path) -> bool:
    """Whether the checkpoint's weights are cut over ranks, as at stage 3."""
    return (directory / _MODEL.format(0, 0)).is_file()


def read_parameters(
    directory: Path, dtype: torch.dtype, tensor_rank: int
) -> dict[str, torch.Tensor]:
    """Every parameter that a tensor-parallel rank holds, as the forward pass used it, on the CPU.

    They are taken from the module's state: DeepSpeed's own converter leaves out frozen weights at
    stage 1. Only tensors and plain containers are unpickled.

    Raises:
        CheckpointError: a shard is missing or cannot be read.
    """
    if is_cut(directory):
        return read_cut_parameters(directory, dtype, tensor_rank)
    return _load(directory / _WHOLE.format(tensor_rank))["module"]


def read_cut_parameters(
    directory: Path, dtype: torch.dtype, tensor_rank: int = 0
) -> dict[str, torch.Tensor]:
    """The same from the slices of a checkpoint at stage 3, in `dtype`.

    Trained parameters are put together from the ranks' masters, frozen ones from their slices.
    Only tensors and plain containers are unpickled.

    Raises:
        CheckpointError: a shard is missing or cannot be read.
    """
    pattern = re.compile(_MODEL.format(r"(\d+)", tensor_rank).replace(".pt", r"\.pt"))
    ranks = [int(m.group(1)) for p in directory.iterdir() if (m := pattern.fullmatch(p.name))]
    if sorted(ranks) != list(range(len(ranks))):
        raise CheckpointError(f"{directory}: has model states of ranks {sorted(ranks)} only")
    states = [_load(directory / _MODEL.format(rank, tensor_rank)) for rank in sorted(ranks)]
    values = {}
    for name, shape in (states[0]["frozen_param_shapes"] or {}).items():
        slices = [state["frozen_param_fragments"][name] for state in states]
        values[name] = _join(slices, shape)
    flats = [_masters(directory, rank, tensor_rank) for rank in sorted(ranks)]
    at = 0
    for group in states[0]["param_shapes"]:
        for name, shape in group.items():
            share = -(-shape.numel() // len(ranks))
            values[name] = _join([flat[at : at + share] for flat in flats], shape).to(dtype)
            at += share
    return values


def _masters(directory: Path, rank: int, tensor_rank: int) -> torch.Tensor:
    """A rank's masters of all sub-groups, in the order of `param_shapes`."""
    found = list(directory.glob(_OPTIMIZER.format(rank, tensor_rank)))
    if len(found) != 1:
        raise CheckpointError(
            f"{directory}: holds {len(found)} optimizer shards of rank {rank} instead of one; copy "
            "the whole checkpoint or use another one"
        )
    return torch.cat(_load(found[0])["optimizer_state_dict"]["fp32_flat_groups"])


def _join(slices: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    return torch.cat([part.view(-1) for part in slices])[: shape.numel()].view(shape)


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use another one") from error
