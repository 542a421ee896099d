"""Which process this is, and how the processes share one model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch

from relora_ds.config.schema import RunConfig
from relora_ds.config.sections import ParallelConfig
from relora_ds.errors import ConfigError
from relora_ds.parallel.islands import ALONE, Islands, join_one_of
from relora_ds.parallel.tensor import SINGLE, TensorParallel, join_tensor_group


@dataclass(frozen=True)
class Topology:
    """Ranks and sizes of the parallel axes of a run: islands, copies within one, parts of a copy.

    Args:
        rank: global process rank.
        world_size: number of processes.
        local_rank: rank within the node; also the index of the accelerator.
        device: where this process computes.
        tp: its part of one copy of the model.
        islands: its island among all of them.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tp: TensorParallel = SINGLE
    islands: Islands = ALONE

    @property
    def data_rank(self) -> int:
        """Which copy of the model this process has a part of, over all islands."""
        return self.rank // self.tp.size

    @property
    def data_size(self) -> int:
        """Copies of the model that see different data, over all islands."""
        return self.world_size // self.tp.size

    @property
    def dp_rank(self) -> int:
        """Rank along the data-parallel axis, within the island."""
        return self.data_rank % self.dp_size

    @property
    def dp_size(self) -> int:
        """Copies of the model within the island, which is all that DeepSpeed knows of."""
        return self.data_size // self.islands.size

    @property
    def island_rank(self) -> int:
        """Rank within the island: its place there, which ranks of other islands have as well."""
        return self.rank % (self.world_size // self.islands.size)

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


def copies_of_island(copies: int, islands: int) -> int:
    """How many of a job's copies of the model each island has.

    Raises:
        ConfigError: they cannot be shared out equally.
    """
    if copies % islands:
        raise ConfigError(
            f"parallel.islands is {islands}, but must divide the copies of the model, which are "
            f"{copies} (processes / parallel.tensor): start a multiple of {islands} times "
            f"parallel.tensor processes, or set parallel.islands={gcd(islands, copies)}"
        )
    return copies // islands


def as_one_island(config: RunConfig) -> RunConfig:
    """The run as one of its islands sees it, with an equal share of the global batch."""
    share = config.train.global_batch_size // config.parallel.islands
    train = config.train.model_copy(update={"global_batch_size": share})
    return config.model_copy(update={"train": train})


def share_models(topology: Topology, config: RunConfig) -> Topology:
    """The topology with its processes divided into `parallel.islands` equal parts, and with every
    `parallel.tensor` neighbours sharing one copy of the model. A collective call.

    Raises:
        ConfigError: the number of processes is not a multiple of their product.
    """
    parallel, timeout = config.parallel, config.train.timeout_minutes
    copies, count = copies_of_model(topology.world_size, parallel.tensor), parallel.islands
    copies_of_island(copies, count)
    tp = join_tensor_group(parallel.tensor, parallel.low_rank_plan, parallel.sequence, timeout)
    found = replace(topology, tp=tp)
    return found if count == 1 else _divide(found, count, config.islands.transport.overlap > 0)


def _divide(topology: Topology, count: int, overlap: bool) -> Topology:
    """The topology in `count` islands, with the groups that DeepSpeed is to see of its own.

    Args:
        overlap: whether islands exchange something while they train.
    """
    rank, tensor = topology.rank, topology.tp.size
    everyone = range(topology.world_size)
    size = topology.world_size // count
    parts = [everyone[first : first + size] for first in everyone[::size]]
    places = [[part[place] for part in parts] for place in range(size)]
    copies = [part[place::tensor] for part in parts for place in range(tensor)]
    group, local = join_one_of(places, rank), join_one_of(parts, rank)
    background = join_one_of(places, rank, backend="gloo") if overlap else None
    islands = Islands(rank // size, count, group, local, background)
    tp = replace(topology.tp, data_group=join_one_of(copies, rank))
    if tp.group is None:  # DeepSpeed takes no group for all processes
        tp = replace(tp, group=join_one_of([[each] for each in everyone], rank))
    return replace(topology, tp=tp, islands=islands)
