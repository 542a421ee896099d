"""Joining the process group through DeepSpeed, which keeps a communication object of its own."""

from __future__ import annotations

import logging
import warnings
from datetime import timedelta

import deepspeed
from deepspeed.utils import logger as deepspeed_logger
from torch.distributed import distributed_c10d


def join_process_group(timeout: timedelta) -> None:
    """Join the group that the environment describes, and bound it and all later ones.

    Args:
        timeout: a collective that takes longer raises on every rank, whatever group it runs in.
    """
    deepspeed_logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch 2.13 renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # The shared-memory all-reduce serves inference only. It is compiled at start-up, fails without
    # a compiler, and leaves 66 MiB per rank in /dev/shm: DeepSpeed has no public switch for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _bound_every_group(timeout)
    deepspeed.init_distributed(timeout=timeout, verbose=False)


def _bound_every_group(timeout: timedelta) -> None:
    """Make `timeout` the default of groups that are created later, by whomever.

    DeepSpeed creates its groups without a timeout, which means torch's default of 10 minutes for
    NCCL and 30 for gloo, not that of the first group. torch has no public way to change it.
    """
    assert callable(distributed_c10d._get_default_timeout)
    distributed_c10d._get_default_timeout = lambda backend: timeout
