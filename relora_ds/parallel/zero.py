"""How ZeRO shares the training state of a model over its data-parallel processes.

The engine reads these settings once from the dictionary that DeepSpeed gets. Everything else asks
for them by name: the engine, the closed forms of bytes and memory, the planner.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Gathering:
    """When stage 3 gathers weights, and for how long they stay whole. Defaults are DeepSpeed's."""

    prefetch: int = 50_000_000
    """Elements that are gathered ahead of their use."""
    persistence: int = 100_000
    """Parameters of at most so many elements stay whole for all micro-batches of an update."""
    reuse_distance: int = 1_000_000_000
    """A parameter stays whole if it is used again before so many elements of others were."""
    live: int = 1_000_000_000
    """Elements that may be whole at once; prefetching stops there."""
    hpz: int = 1
    """Processes that hold a second copy of the weights between them; 1 means that there is none."""


@dataclass(frozen=True)
class ZeroSettings:
    """ZeRO's settings of one run. Defaults are DeepSpeed's, sizes are in elements."""

    stage: int
    """0 shares nothing, 1 optimizer states, 2 gradients as well, 3 weights as well."""
    dtype: torch.dtype = torch.float32
    """Working precision of weights and activations, and of gradients before they are reduced."""
    accumulation: int = 1
    """Micro-batches of a process in one update."""
    micro_batch_size: int = 1
    """Sequences of a process in one micro-batch."""
    global_batch_size: int = 1
    """Sequences of all processes in one update."""
    clip: float = 0.0
    """Largest global gradient norm; 0 turns clipping off."""
    communication_dtype: torch.dtype | None = None
    """Precision in which gradients are reduced; None for the working precision."""
    reduces_once: bool = False
    """Gradients are held back so that an update reduces them once, not once per micro-batch."""
    checks_overflow: bool = True
    """In bf16, processes agree at stages 1 and 2 on whether a gradient overflowed."""
    reduce_bucket: int = 500_000_000
    """Gradients that are reduced together."""
    overlaps: bool = False
    """Reduces one bucket while the next one fills."""
    reduce_scatter: bool = True
    """A process receives the sums of its own part of the gradients, where the stage allows it."""
    joins_owners: bool = True
    """At stages 1 and 2 one all-reduce serves all owners of a bucket's parts."""
    sub_group: int = 1_000_000_000
    """Elements of a process's part that stage 3 updates at a time."""
    gathering: Gathering = Gathering()
    """When stage 3 gathers weights."""
    gathers_by_all_reduce: bool = False
    """Stage 3 gathers weights with all-reduces instead of all-gathers."""
    module_granularity: int = 0
    """Modules up to this size are gathered with everything inside of them; 0 for none."""
    model_persistence: int | None = None
    """Most elements that may stay whole for all micro-batches of an update; None for no limit."""
    sanity_checks: bool = False
    """Stage 3 compares what processes are about to reduce."""
    offloads_optimizer: bool = False
    """Masters and moments live on the host."""
    offloads_weights: bool = False
    """Slices of weights live on the host."""
    deepspeed: dict[str, Any] = field(default_factory=dict, hash=False, repr=False)
    """The dictionary that all of this was read from, as DeepSpeed gets it."""

    @property
    def element_size(self) -> int:
        """Bytes of a number in working precision."""
        return self.dtype.itemsize

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Precision in which gradients are reduced."""
        return self.communication_dtype or self.dtype

    @property
    def dp_size(self) -> int:
        """Data-parallel processes, from the three sizes of batches."""
        return self.global_batch_size // (self.micro_batch_size * self.accumulation)
