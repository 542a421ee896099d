"""Joining the process group through DeepSpeed, which keeps a communication object of its own."""

from __future__ import annotations

import logging
import warnings
from datetime import timedelta
from typing import Any, Literal

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from torch.distributed import distributed_c10d

from relora_ds.errors import ConfigError


def accelerator_type() -> Literal["cpu", "cuda"]:
    """What DeepSpeed computes on; ``DS_ACCELERATOR`` overrides what it finds.

    Raises:
        ConfigError: it is neither a CPU nor a GPU that torch calls CUDA.
    """
    accelerator: Any = get_accelerator()
    name = accelerator.device_name()
    if name not in ("cpu", "cuda"):
        raise ConfigError(
            f"DeepSpeed found the accelerator {name!r}, which is not supported: set "
            "DS_ACCELERATOR to cuda or cpu"
        )
    return name


def join_process_group(timeout: timedelta, backend: str | None = None) -> None:
    """Join the group that the environment describes, and bound it and all later ones.

    Args:
        timeout: a collective that takes longer raises on every rank, whatever group it runs in.
        backend: of its collectives; by default the accelerator's own.
    """
    deepspeed_logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch 2.13 renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # The shared-memory all-reduce serves inference only. It is compiled at start-up, fails without
    # a compiler, and leaves 66 MiB per rank in /dev/shm: DeepSpeed has no public switch for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _bound_every_group(timeout)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def _bound_every_group(timeout: timedelta) -> None:
    """Make `timeout` the default of groups that are created later, by whomever.

    DeepSpeed creates its groups without a timeout, which means torch's default of 10 minutes for
    NCCL and 30 for gloo, not that of the first group. torch has no public way to change it.
    """
    assert callable(distributed_c10d._get_default_timeout)
    distributed_c10d._get_default_timeout = lambda backend: timeout
