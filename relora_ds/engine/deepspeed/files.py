"""DeepSpeed's files of a checkpoint: their names, and the only way in which they are read.

Nothing in them is ever executed. A file is unpickled through an allow-list of tensors, containers
and three harmless classes of DeepSpeed's own, and what comes out is looked at before it is used: a
shard may come from anywhere, and an altered one must end in one clear error.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from relora_ds.errors import CheckpointError
from relora_ds.files.unpickled import check_archive, check_tensor

ALLOWED = (LossScaler, ZeroStageEnum, fragment_address)
"""Classes of DeepSpeed in its files; none of them does anything when it is built."""

_MAX_DEPTH = 32
_MAX_VALUES = 1_000_000  # a 7B model's largest file holds some thousands
_REASON = 300  # characters of a library's own words
_NAMES = 5


def model_file(tensor_rank: int) -> str:
    """Name of the file that holds a tensor-parallel rank's model, at stages 0 to 2."""
    return f"mp_rank_{tensor_rank:02d}_model_states.pt"


def sliced_model_file(rank: int, tensor_rank: int) -> str:
    """Name of the file that holds a data-parallel rank's slices of that, at stage 3."""
    return f"zero_pp_rank_{rank}_mp_rank_{tensor_rank:02d}_model_states.pt"


def optimizer_file(rank: int, tensor_rank: int, dtype: torch.dtype) -> str:
    """Name of the file that holds a rank's part of masters and moments, at stages 1 to 3.

    Args:
        rank: within its data-parallel group.
        tensor_rank: within its tensor-parallel group.
        dtype: what the model computes in.
    """
    prefix = "bf16_" if dtype == torch.bfloat16 else ""
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_{tensor_rank:02d}_optim_states.pt"


def shard_files(stage: int, dp_size: int, tp_size: int, dtype: torch.dtype) -> Iterator[str]:
    """Names of all files that DeepSpeed writes into a checkpoint of a run."""
    for tensor_rank in range(tp_size):
        if stage < 3:
            yield model_file(tensor_rank)
        for rank in range(dp_size if stage else 0):  # nobody checked `dp_size` at stage 0
            if stage == 3:
                yield sliced_model_file(rank, tensor_rank)
            yield optimizer_file(rank, tensor_rank, dtype)


def open_shard(path: Path) -> dict[str, Any]:
    """What is in a file, on the CPU; its tensors are mapped and read when they are used.

    Raises:
        CheckpointError: it cannot be read, or holds something else than tensors, numbers, text and
            containers of them.
    """
    try:
        check_archive(path)
        with _only_allowed():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _check_plain(content)
    except Exception as error:  # there is no end to what a damaged file makes its readers raise
        raise CheckpointError(f"{path}: {_reason(path, error)}; use another checkpoint") from error
    return content


def read_shard(path: Path) -> dict[str, Any]:
    """What is in a file, on the CPU and in memory of its own: it may become a run's state, which
    must not be a view of a file that is removed or rewritten.

    Raises:
        CheckpointError: as `open_shard`.
    """
    content = open_shard(path)
    if isinstance(content.get("module"), dict):
        # its `_metadata` could tell modules to take the tensors themselves in place of their values
        content["module"] = dict(content["module"])
    return copy.deepcopy(content)


@contextmanager
def _only_allowed() -> Iterator[None]:
    """Torch's list of harmless classes is ours alone: any library may have added to it."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(ALLOWED))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _check_plain(content: Any) -> None:
    """Make sure that a file's content is a dictionary of plain values and of tensors in memory.

    Raises:
        ValueError: it is not, or is nested without end.
    """
    if not isinstance(content, dict):
        raise ValueError(f"holds {_kind(content)} instead of a dictionary")
    pending, seen = [(0, content)], 0
    while pending:
        depth, value = pending.pop()
        seen += 1
        if depth > _MAX_DEPTH or seen > _MAX_VALUES:  # a list may hold itself, or others again
            raise ValueError("is nested deeper than any file of DeepSpeed")
        pending += [(depth + 1, inner) for inner in _inside(value)]


def _inside(value: Any) -> Iterator[Any]:
    """What a value holds."""
    if isinstance(value, torch.Tensor):
        check_tensor(value)
    elif type(value) in (dict, OrderedDict):
        yield from value.keys()
        yield from value.values()
        yield from getattr(value, "__dict__", {}).values()
    elif type(value) in (list, tuple, set, torch.Size):
        yield from value
    elif type(value) in (LossScaler, fragment_address):
        yield from vars(value).values()
    elif value is not None and not isinstance(
        value, (bool, int, float, str, torch.dtype, ZeroStageEnum)
    ):
        raise ValueError(f"holds {_kind(value)}, which is no plain value")


def _kind(value: Any) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _reason(path: Path, error: Exception) -> str:
    """Why a file cannot be used, in one line."""
    if isinstance(error, UnpicklingError):
        foreign = _foreign_names(path)
        if foreign:
            return f"holds {', '.join(foreign)}, which is code and no tensor; nothing of it was run"
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return f"cannot be read ({text[:_REASON] or type(error).__name__})"


def _foreign_names(path: Path) -> list[str]:
    """The first names in a pickle that are not on the allow-list; it is read, not run."""
    try:
        with _only_allowed():
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # what is no pickle holds none
        return []
    return sorted(found)[:_NAMES]
