"""Starting and stopping the process group, under any launcher or none."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import TypeVar

import torch

from relora_ds.engine.deepspeed.process_group import join_process_group
from relora_ds.parallel.topology import Topology

T = TypeVar("T")

# gloo raises plain RuntimeError with the words of the operating system
_SIGNS_OF_LOSS = (
    "timed out",
    "timeout",
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "no route to host",
    "connection refused",
    "network is unreachable",
)


def start(timeout_minutes: float) -> Topology:
    """Join the process group that the launcher describes, or a group of one.

    Args:
        timeout_minutes: a collective that takes longer raises on every rank, whatever group it
            runs in.

    Returns:
        This process's place; it computes on GPU `local_rank`, or on the CPU where there is none.
    """
    if "RANK" not in os.environ:
        _describe_single_process()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    join_process_group(timedelta(minutes=timeout_minutes))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return Topology(rank, world_size, local_rank, device)


def stop() -> None:
    """Leave the process group; gloo aborts at interpreter exit if nobody does."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def lost_peers(error: RuntimeError) -> bool:
    """Whether an error means that another process did not answer, or is no longer there."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    return any(sign in text for sign in _SIGNS_OF_LOSS)


def rank() -> int:
    """This process's global rank."""
    return torch.distributed.get_rank()


def barrier() -> None:
    """Wait for every process."""
    torch.distributed.barrier()


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every process's value, in the order of their ranks, on every rank."""
    box: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(box, value)
    return box


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over all processes, in place."""
    torch.distributed.all_reduce(value)
    return value.div_(torch.distributed.get_world_size())


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes, in place."""
    torch.distributed.all_reduce(value)
    return value


def _describe_single_process() -> None:
    """Fill in what a launcher would have set, on a port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
