"""Where a process computes, how its processes talk, and what its arithmetic promises.

With `train.deterministic` two runs on equal GPUs, and a resumed one, are equal bit for bit; without
it, to the rounding of atomics. On CPUs they are equal bit for bit either way.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from relora_ds.config.sections import TrainConfig
from relora_ds.engine.deepspeed.process_group import accelerator_type
from relora_ds.engine.zero.layout import Layout
from relora_ds.errors import ConfigError

_BACKEND = "RELORA_DS_BACKEND"
_BACKENDS = ("nccl", "gloo")
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")

# of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 << 20
"""Bytes of a block; glibc takes no larger limit."""


def set_arithmetic(train: TrainConfig) -> None:
    """Choose the kernels of this process. Call it before CUDA starts.

    Raises:
        ConfigError: the environment asks cuBLAS for what a deterministic run rules out.
    """
    if accelerator_type() != "cuda":
        return
    # a container may have switched TF32 on, which takes 13 bits off every edit of a weight
    torch.set_float32_matmul_precision("high" if train.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = train.tf32
    # gradients of factors are sums over all tokens, and split ones would be added up in bf16
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if train.deterministic:
        given = os.environ.setdefault(_WORKSPACE, _DETERMINISTIC_WORKSPACES[0])
        if given not in _DETERMINISTIC_WORKSPACES:
            raise ConfigError(
                f"{_WORKSPACE} is {given!r}, with which cuBLAS may add up in any order: unset it, "
                "or set train.deterministic=false"
            )
        # every torch.empty would be written once more
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(train.deterministic)


def take_device(local_rank: int) -> torch.device:
    """The device of this process, which becomes CUDA's current one.

    Where `RELORA_DS_BACKEND=gloo` processes may share a GPU: they take turns in the order of their
    local ranks.

    Raises:
        ConfigError: the machine has fewer GPUs than processes.
    """
    if accelerator_type() != "cuda":
        keep_freed_memory()
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = local_rank % count if communication_backend() == "gloo" and count else local_rank
    if index >= count:
        raise ConfigError(
            f"process {local_rank} of this machine (LOCAL_RANK) wants GPU {index}, but only "
            f"{count} are visible: start {count} processes, or see CUDA_VISIBLE_DEVICES; with "
            f"{_BACKEND}=gloo processes share GPUs, for tests"
        )
    # DeepSpeed reads this variable when it picks a device by itself
    os.environ["LOCAL_RANK"] = str(index)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step, as torch does on GPUs.

    It gives blocks of some MiB back to the system at once, and every page that it then gets anew
    costs a fault and a pass of zeros: 1 to 3 % of a step. Other C libraries are left alone, and so
    are limits that the environment sets.
    """
    given = any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"))
    library = ctypes.CDLL(None)
    if given or not hasattr(library, "gnu_get_libc_version"):
        return
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    library.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a device, used or not; None for a host, whose processes share what it has."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def check_places(optimizer: str, layout: Layout, edited: Sequence[nn.Parameter]) -> None:
    """Refuse placements for which there is no arithmetic.

    Args:
        optimizer: name in the run file.
        layout: where masters and working weights are.
        edited: frozen weights that the method edits.

    Raises:
        ConfigError: the optimizer of the host has its masters on a GPU, or weights that are edited
            lie on the host while the factors are on a GPU.
    """
    on_host = all(owner.device.type == "cpu" for owner in layout.owners())
    if optimizer == "cpu_adam" and not on_host:
        raise ConfigError(
            "optimizer.name is cpu_adam, but its states are on the GPU: set zero_optimization."
            "offload_optimizer.device to cpu, or choose adamw or fused_adam"
        )
    parted = [weight for weight in edited if layout.working(weight)[1].device != weight.device]
    if parted:
        raise ConfigError(
            "zero_optimization.offload_param keeps the frozen weights on the host, where a GPU "
            "cannot edit them: remove it, or choose a method that edits no weights (lora, "
            "low_rank, sltrain, full)"
        )


def communication_backend() -> str | None:
    """What the environment wants instead of the device's own backend; None if nothing.

    NCCL refuses two processes on one GPU, gloo does not.

    Raises:
        ConfigError: nobody knows it.
    """
    wanted = os.environ.get(_BACKEND)
    if not wanted:
        return None
    if wanted not in _BACKENDS:
        raise ConfigError(f"{_BACKEND} is {wanted!r}: set it to nccl or gloo, or unset it")
    if wanted == "nccl" and accelerator_type() != "cuda":
        raise ConfigError(f"{_BACKEND} is 'nccl', which needs GPUs: unset it")
    return wanted
