"""Which process this is, and how the processes share one model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch

from relora_ds.config.schema import RunConfig
from relora_ds.config.sections import ParallelConfig
from relora_ds.errors import ConfigError
from relora_ds.parallel.tensor import SINGLE, TensorParallel, join_tensor_group


@dataclass(frozen=True)
class Topology:
    """Ranks and sizes of the parallel axes of a run.

    Args:
        rank: global process rank.
        world_size: number of processes.
        local_rank: rank within the node; also the index of the accelerator.
        device: where this process computes.
        tp: its part of one copy of the model.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tp: TensorParallel = SINGLE

    @property
    def dp_rank(self) -> int:
        """Rank along the data-parallel axis."""
        return self.rank // self.tp.size

    @property
    def dp_size(self) -> int:
        """Copies of the model that see different data."""
        return self.world_size // self.tp.size

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once per run."""
        return self.rank == 0


def part_of_model(parallel: ParallelConfig, rank: int = 0) -> TensorParallel:
    """The place of a rank that shares a copy of the model, described without its group."""
    size, plan = parallel.tensor, parallel.low_rank_plan
    return TensorParallel(rank, size, plan=plan, sequence=parallel.sequence and size > 1)


def copies_of_model(processes: int, tensor: int) -> int:
    """How many copies of the model the processes hold, `tensor` of them sharing one.

    Raises:
        ConfigError: the number of processes is not a multiple of `tensor`.
    """
    if processes % tensor:
        raise ConfigError(
            f"parallel.tensor is {tensor}, but must divide the number of processes ({processes}): "
            f"start a multiple of {tensor}, or set parallel.tensor={gcd(tensor, processes)}"
        )
    return processes // tensor


def share_models(topology: Topology, config: RunConfig) -> Topology:
    """The topology with every `parallel.tensor` neighbours sharing one copy of the model.

    Raises:
        ConfigError: the number of processes is not a multiple of it.
    """
    size = config.parallel.tensor
    copies_of_model(topology.world_size, size)
    parallel, timeout = config.parallel, config.train.timeout_minutes
    tp = join_tensor_group(size, parallel.low_rank_plan, parallel.sequence, timeout)
    return replace(topology, tp=tp)
