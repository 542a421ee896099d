"""Which process this is, and how the processes share one model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Topology:
    """Ranks and sizes of the parallel axes of a run.

    Args:
        rank: global process rank.
        world_size: number of processes.
        local_rank: rank within the node; also the index of the accelerator.
        device: where this process computes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def dp_rank(self) -> int:
        """Rank along the data-parallel axis."""
        return self.rank

    @property
    def dp_size(self) -> int:
        """Copies of the model that see different data."""
        return self.world_size

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once per run."""
        return self.rank == 0
