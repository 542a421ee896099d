"""What a plan says: of a cluster, of each phase and ZeRO stage, and of ways to cut a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from relora_ds.accounting.memory.use import MemoryUse
from relora_ds.parallel.tensor import LowRankPlan


@dataclass(frozen=True)
class Cluster:
    """GPUs and what connects them; the defaults are H100s with one 400 Gb/s port each."""

    gpus: int
    gpus_per_node: int = 8
    gpu_memory: float = 80e9
    """Bytes."""
    node_bandwidth: float = 450e9
    """Bytes per second that a GPU sends within its node."""
    bandwidth: float = 50e9
    """Bytes per second that a GPU sends to other nodes."""
    latency: float = 10e-6
    """Seconds of a collective per doubling of its processes."""
    peak_flops: float = 989.4e12
    """Per GPU."""
    efficiency: float = 0.4
    """Share of the peak that the model reaches."""
    reserve: float = 0.08
    """Share of the memory left to CUDA, kernels and fragmentation."""


@dataclass(frozen=True)
class IslandLink:
    """What connects an island with all others; its processes share it."""

    bandwidth: float
    """Bytes per second that an island sends."""
    latency: float = 0.01
    """Seconds one way."""


@dataclass(frozen=True)
class GpuMemory(MemoryUse):
    """Bytes that a GPU holds; residuals of edited weights are apart from `weights`."""

    transient: int = 0
    """What lives for one product or one step, or for an event and is more than the gradients."""
    residual: int = 0
    """What restores the exact value of edited weights."""
    gathered: int = 0
    """Weights that stage 3 makes whole for a while, and hpZ's second copy of its slices."""
    parked: int = 0
    """What the method keeps on the device beside the model."""
    buffers: int = 0
    """DeepSpeed's buckets, and shares of gradients that are joined for one collective."""


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that a GPU moves per step, between copies of the model and within one."""

    gradient_payload: int
    """Payload of reduced gradients, between copies of the model."""
    payload: int
    """Payload of all collectives."""
    wire: float
    """What a GPU sends, to its own node and to others."""
    within_node: float
    """The part of `wire` that stays within the node."""
    between_nodes: float
    """The part of `wire` that leaves the node."""
    tensor_payload: int
    """The part of `payload` that moves within a copy of the model."""
    tensor_within_node: float
    """The part of `within_node` that moves within a copy of the model."""
    tensor_between_nodes: float
    """The part of `between_nodes` that moves within a copy of the model."""


@dataclass(frozen=True)
class Seconds:
    """Time of one step."""

    compute: float
    communication: float
    """Between copies of the model."""
    tensor: float
    """Communication within a copy of the model, which overlaps with nothing."""
    overlapped: float
    """The step, if computing hides communication or the other way round."""
    serial: float
    """The step, if communication follows computing."""


@dataclass(frozen=True)
class Estimate:
    """What one phase takes up, moves and needs with one DeepSpeed configuration."""

    memory: GpuMemory
    bytes_per_gpu: int
    """The sum of `memory`."""
    states_held_alike: int
    """Bytes of states that every tensor-parallel GPU of a copy holds."""
    host_bytes_per_node: int
    fits: bool
    largest_micro_batch: int
    """Sequences of the largest micro-batch that fits; 0 if none does."""
    traffic: StepTraffic
    seconds: Seconds


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a run at every ZeRO stage that it can have."""

    trained: int
    """Trained parameters of the whole model."""
    frozen: int
    """Frozen parameters of the whole model."""
    stages: dict[str, Estimate]
    """By the name of the stage, such as `2` or `3 hpZ 8`."""


@dataclass(frozen=True)
class Cut:
    """How a run is divided over processes."""

    tensor: int
    """`parallel.tensor`."""
    low_rank_plan: LowRankPlan
    """`parallel.low_rank_plan`."""
    stage: str
    """Name of the ZeRO stage."""


@dataclass(frozen=True)
class Candidate(Cut):
    """A cut with the worst that its phases need."""

    fits: bool
    bytes_per_gpu: int
    states: int
    """Bytes of optimizer states per GPU."""
    states_held_alike: int
    """The part of `states` that every tensor-parallel GPU of a copy holds."""
    largest_micro_batch: int
    seconds: float
    """Time of a step in which nothing overlaps."""


@dataclass(frozen=True)
class Plan:
    """What a run takes up, moves and needs on a cluster, and how to cut it."""

    cluster: Cluster
    processes: int
    """Data-parallel, with the tensor-parallel size that was asked for."""
    asked: Cut
    suggested: Candidate | None
    """The fastest that fits; None if nothing does."""
    sizes: list[Candidate]
    """The best stage of each tensor-parallel size and plan for low-rank factors."""
    phases: dict[str, PhasePlan]
    """By name, with the tensor-parallel size that was asked for."""

    def as_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values, as `tools/plan.py --json` prints them."""
        return asdict(self)


@dataclass(frozen=True)
class Round:
    """Rounds of one length."""

    every: int
    """Updates."""
    bytes_per_update: float
    """What an island sends, spread over all updates of the phase."""
    seconds_per_update: float
    speed: float
    """Share of the speed of an island that meets nobody."""
    less: float
    """How many times less than data parallelism of the full model in bf16 it sends."""


@dataclass(frozen=True)
class IslandsPlan:
    """What passes between the islands of a run in one of its phases."""

    islands: int
    bits: int
    """Of an element at the end of a round."""
    round_bytes: float
    """What an island sends at the end of a round."""
    fragments: int
    """In which it travels."""
    fragment_bytes: float
    """What it sends of the largest one."""
    overlap: int
    """Updates during which a fragment travels."""
    merge_bytes: float
    """What it sends besides where a merge follows."""
    refresh_bytes: float
    """What it sends besides where a method asks for dense gradients of the whole batch."""
    dense_bytes: float
    """What it would send per update for data parallelism of the full model in bf16."""
    local_seconds: float
    """An update that is followed by no exchange."""
    dense_seconds: float
    """An update with data parallelism of the full model in bf16 over the link."""
    rounds: list[Round]
    """By length."""
    asked: Round
    """Of the length that the run asks for."""
    best: int | None
    """Updates of the shortest round that keeps nine tenths of the local speed, if one does."""
