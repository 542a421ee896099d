"""Reading the shards of a ZeRO stage 3 checkpoint without an engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from relora_ds.errors import CheckpointError

_MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
_OPTIMIZER = "*zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def is_cut(directory: Path) -> bool:
    """Whether the checkpoint's weights are cut over ranks, as at stage 3."""
    return (directory / _MODEL.format(0)).is_file()


def read_cut_parameters(directory: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every parameter of the model, whole, as the forward pass used it: in `dtype`, on the CPU.

    Trained parameters are put together from the ranks' masters, frozen ones from their slices.
    Only tensors and plain containers are unpickled.

    Raises:
        CheckpointError: a shard is missing or cannot be read.
    """
    ranks = [int(m.group(1)) for p in directory.iterdir() if (m := _RANK.fullmatch(p.name))]
    if sorted(ranks) != list(range(len(ranks))):
        raise CheckpointError(f"{directory}: has model states of ranks {sorted(ranks)} only")
    states = [_load(directory / _MODEL.format(rank)) for rank in sorted(ranks)]
    values = {}
    for name, shape in (states[0]["frozen_param_shapes"] or {}).items():
        slices = [state["frozen_param_fragments"][name] for state in states]
        values[name] = _join(slices, shape)
    flats = [_masters(directory, rank) for rank in sorted(ranks)]
    at = 0
    for group in states[0]["param_shapes"]:
        for name, shape in group.items():
            share = -(-shape.numel() // len(ranks))
            values[name] = _join([flat[at : at + share] for flat in flats], shape).to(dtype)
            at += share
    return values


_RANK = re.compile(re.escape(_MODEL).replace(r"\{\}", r"(\d+)"))


def _masters(directory: Path, rank: int) -> torch.Tensor:
    """A rank's masters of all sub-groups, in the order of `param_shapes`."""
    found = list(directory.glob(_OPTIMIZER.format(rank)))
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
