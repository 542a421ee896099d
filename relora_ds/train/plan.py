"""What a run will take up, move and need in time on a cluster, before anything is started.

Memory and bytes are the closed forms of `model.memory` and `engine.traffic`. Time is a model: the
operations of `model.flops` at a share of the peak, and latency plus bytes over bandwidth for
communication. The true step lies between the larger of the two, if they overlap, and their sum.
Composing weights (SLTrain) and events are not among those operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from relora_ds.config.load import LoadedRun, check_processes
from relora_ds.config.schema import RunConfig
from relora_ds.config.source import read_json
from relora_ds.engine.collectives import wire_by_link
from relora_ds.engine.deepspeed_config import (
    reduces_once,
    resolve_deepspeed_config,
    zero_stage,
)
from relora_ds.engine.gathers import gathered
from relora_ds.engine.traffic import HPZ_GROUP, Payloads, bytes_of, expected_payloads
from relora_ds.errors import ConfigError
from relora_ds.methods.registry import Phase, plan_phases
from relora_ds.model.flops import flops_per_token, parameter_counts
from relora_ds.train.build import meta_model
from relora_ds.train.memory_report import closed_form, storage_plan

_BYTES = {"float32": 4, "bfloat16": 2}
# DeepSpeed flattens so many elements at a time at stage 0
_STAGE_0_BUCKET = 500_000_000


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


def plan(loaded: LoadedRun, cluster: Cluster) -> dict[str, Any]:
    """Estimates of every phase of a run at every ZeRO stage, and which stage to take.

    Raises:
        ConfigError: the run does not fit the number of processes.
    """
    config = loaded.config
    processes, left = divmod(cluster.gpus, config.parallel.tensor)
    if left or (cluster.gpus > cluster.gpus_per_node and cluster.gpus % cluster.gpus_per_node):
        raise ConfigError(
            f"--gpus {cluster.gpus} must be a multiple of parallel.tensor "
            f"({config.parallel.tensor}) and, on several nodes, of --gpus-per-node "
            f"({cluster.gpus_per_node})"
        )
    check_processes(loaded, processes)
    asked = resolve_deepspeed_config(config.deepspeed, config, processes)
    options = dict(_options(config, cluster, processes))
    phases = {}
    for phase in plan_phases(config):
        planner = _Planner(loaded, phase, cluster, processes)
        estimates = {name: planner.estimate(option) for name, option in options.items()}
        phases[phase.name] = {**planner.counts(), "stages": estimates}
    return {
        "cluster": asdict(cluster),
        "processes": processes,
        "asked": _name(asked),
        "suggested": _suggest([found["stages"] for found in phases.values()]),
        "phases": phases,
    }


def _options(
    config: RunConfig, cluster: Cluster, processes: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """DeepSpeed configurations by name: the run's own file at its stage, defaults at the others."""
    own = read_json(config.deepspeed).data
    zero = own.get("zero_optimization", {})
    hpz = cluster.gpus_per_node
    for stage, copies in ((0, 1), (1, 1), (2, 1), (3, 1), (3, hpz)):
        if copies > 1 and processes <= copies:
            continue
        section = {**(zero if zero.get("stage", 0) == stage else {}), "stage": stage}
        if copies > 1:
            section["zero_hpz_partition_size"] = copies
        try:
            resolved = resolve_deepspeed_config(
                {**own, "zero_optimization": section}, config, processes
            )
        except ConfigError:
            continue  # per-layer updates are for stage 0, candidates on the host for some, ...
        yield _name(resolved), resolved


def _name(resolved: Mapping[str, Any]) -> str:
    hpz = resolved["zero_optimization"].get("zero_hpz_partition_size", 1)
    return f"{zero_stage(resolved)}" + (f" hpZ {hpz}" if hpz > 1 else "")


def _suggest(phases: list[dict[str, Any]]) -> str | None:
    """The stage that fits in every phase and takes least time; of equals the smaller one."""
    fitting = [name for name in phases[0] if all(stages[name]["fits"] for stages in phases)]
    slowest = {name: max(s[name]["seconds"]["serial"] for s in phases) for name in fitting}
    size = {name: max(s[name]["bytes_per_gpu"] for s in phases) for name in fitting}
    # times that differ by a percent are equal in such a model
    best = min(slowest.values(), default=0.0) * 1.01
    return min((n for n in fitting if slowest[n] <= best), key=lambda n: size[n], default=None)


class _Planner:
    """Estimates of one phase."""

    def __init__(self, loaded: LoadedRun, phase: Phase, cluster: Cluster, processes: int) -> None:
        self._config, self._architecture = loaded.config, loaded.architecture
        self._method, self._cluster, self._processes = phase.method, cluster, processes
        self._model = meta_model(self._architecture, self._method, self._config.train)
        self._groups = [g.parameters for g in self._method.parameter_groups(self._model)]
        self._edited = sum(p.numel() for p in self._method.edited_weights(self._model))

    def counts(self) -> dict[str, int]:
        """Parameters of the phase's model."""
        counts = parameter_counts(self._model)
        return {"trained": counts.trainable, "frozen": counts.frozen}

    def estimate(self, resolved: Mapping[str, Any]) -> dict[str, Any]:
        """Memory, bytes and time with one DeepSpeed configuration."""
        live, calls = self._gathers(resolved)
        memory = self._memory(resolved, live)
        total = sum(memory.values())
        per_sequence, room = self._per_sequence(resolved), self._room()
        micro = self._config.train.micro_batch_size
        largest = micro + math.floor((room - total) / per_sequence)
        moved = self._traffic(resolved)
        return {
            "memory": memory,
            "bytes_per_gpu": total,
            "host_bytes_per_node": self._method.parked_elements(self._model)[1] * self._working(),
            "fits": total <= room,
            "largest_micro_batch": max(0, largest),
            "traffic": moved,
            "seconds": self._seconds(resolved, moved, calls),
        }

    def _working(self) -> int:
        return 2 if self._config.train.precision == "bf16" else 4

    def _room(self) -> float:
        return self._cluster.gpu_memory * (1 - self._cluster.reserve)

    def _gathers(self, resolved: Mapping[str, Any]) -> tuple[int, int]:
        """Elements of gathered weights that are held at once, and the calls that gather them."""
        if zero_stage(resolved) < 3 or self._processes == 1:
            return 0, 0
        zero, steps = resolved["zero_optimization"], resolved["gradient_accumulation_steps"]
        replay = gathered(self._model, zero, self._processes, int(steps))
        return replay.live, replay.calls

    def _form(self, resolved: Mapping[str, Any], micro: int) -> dict[str, int]:
        train = self._config.train.model_copy(update={"micro_batch_size": micro})
        config = self._config.model_copy(update={"train": train})
        device = torch.device("cuda")
        stage = zero_stage(resolved)
        storage = storage_plan(config, stage, self._processes, device)
        return closed_form(config, self._architecture, self._method, storage)

    def _memory(self, resolved: Mapping[str, Any], live: int) -> dict[str, int]:
        """Bytes per GPU by component, that of residuals apart from that of weights."""
        zero, stage = resolved["zero_optimization"], zero_stage(resolved)
        form = self._form(resolved, self._config.train.micro_batch_size)
        storage = storage_plan(self._config, stage, self._processes, torch.device("cuda"))
        residual = storage.beside_edited * self._edited
        residual //= self._processes if stage == 3 else 1
        trained = sum(p.numel() for group in self._groups for p in group)
        bucket = min(int(zero.get("reduce_bucket_size", _STAGE_0_BUCKET)), trained)
        if stage == 0:
            bucket = min(_STAGE_0_BUCKET, trained)
        buffers = bucket * self._working() * (2 if zero.get("overlap_comm") else 1)
        copies = int(zero.get("zero_hpz_partition_size", 1))
        held = parameter_counts(self._model).total // copies if copies > 1 else 0
        parked = self._method.parked_elements(self._model)[0]
        return {
            **form,
            "weights": form["weights"] - residual,
            "residual": residual,
            "gathered": (live + held) * self._working(),
            "parked": parked * self._working(),
            "buffers": buffers if self._processes > 1 else 0,
        }

    def _per_sequence(self, resolved: Mapping[str, Any]) -> int:
        one, two = (self._form(resolved, micro)["activations"] for micro in (1, 2))
        return two - one

    def _payloads(self, resolved: Mapping[str, Any]) -> Payloads:
        once = reduces_once(self._config, resolved)
        return expected_payloads(self._model, self._groups, resolved, self._processes, once=once)

    def _traffic(self, resolved: Mapping[str, Any]) -> dict[str, Any]:
        """Bytes per step and GPU: payload of gradients and of everything, wire bytes by link."""
        payloads = self._payloads(resolved)
        near = far = 0.0
        for kind, size in payloads.items():
            # hpZ's copies lie within nodes
            per_node = kind.size if kind.group == HPZ_GROUP else self._cluster.gpus_per_node
            link = wire_by_link(kind.operation, size, kind.size, per_node)
            near, far = near + link.near, far + link.far
        gradients = [
            size
            for kind, size in payloads.items()
            if kind.phase == "backward" and kind.operation != "all_gather"
        ]
        payload, wire = bytes_of(payloads)
        return {
            "gradient_payload": sum(gradients),
            "payload": payload,
            "wire": wire,
            "within_node": near,
            "between_nodes": far,
        }

    def _seconds(
        self, resolved: Mapping[str, Any], moved: Mapping[str, Any], gathers: int
    ) -> dict[str, float]:
        train, cluster = self._config.train, self._cluster
        tokens = train.global_batch_size * train.seq_length / cluster.gpus
        operations = flops_per_token(self._model, train.seq_length) * tokens
        if train.activation_checkpointing:
            operations += _forward_flops(self._model) * tokens
        compute = operations / (cluster.peak_flops * cluster.efficiency)
        zero = resolved["zero_optimization"]
        bucket = int(zero.get("reduce_bucket_size", _STAGE_0_BUCKET)) * self._working()
        calls = gathers + math.ceil(moved["gradient_payload"] / bucket) + len(self._groups)
        communication = 0.0
        if self._processes > 1:
            communication = calls * cluster.latency * math.ceil(math.log2(self._processes))
            communication += moved["within_node"] / cluster.node_bandwidth
            communication += moved["between_nodes"] / cluster.bandwidth
        return {
            "compute": compute,
            "communication": communication,
            "overlapped": max(compute, communication),
            "serial": compute + communication,
        }


def _forward_flops(model: nn.Module) -> float:
    """What recomputing the layers adds per token: two per element of a projection."""
    kinds = parameter_counts(model).by_kind
    return 2.0 * sum(sum(kinds.get(kind, (0, 0))) for kind in ("attention", "mlp"))
