"""Bytes and time of communication, measured on live engines beside their closed form.

Volumes come from steps with the recorder, times from steps without it, in alternation within one
engine; what counting costs is measured by the call, because it drowns in the noise of steps. What
communication alone takes is timed on the same collectives with nothing in between: its share of a
step is what would be gained at most if it overlapped with everything else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from relora_ds.accounting.collectives import wire_bytes
from relora_ds.accounting.recorder import Traffic, Volumes, counting_seconds, recorder
from relora_ds.accounting.tp_traffic import shares_by_rank, tensor_payloads
from relora_ds.accounting.zero_traffic import bytes_of, expected_payloads
from relora_ds.config.checks import heads_divide_over_tensor
from relora_ds.config.methods.catalogue import method_models
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.deepspeed.partition import build_partitioner
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import ConfigError
from relora_ds.methods.build import build_model, sharded_meta_model
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.parallel.topology import Topology, share_models
from relora_ds.parallel.zero import ZeroSettings

# Stage 3 learns the order of modules in the first two micro-batches
_WARM_UP = 3


@dataclass(frozen=True)
class Workload:
    """What is measured, on the processes that there are."""

    architecture: ModelConfig
    methods: tuple[str, ...]
    stages: tuple[int, ...]
    accumulations: tuple[int, ...]
    rank: int
    """Of the adapters."""
    precision: str
    micro_batch_size: int
    seq_length: int
    reduction: str = "micro_batch"
    """`train.gradient_reduction`."""
    steps: int = 6
    """Timed steps of either kind."""
    tensor: int = 1
    """`parallel.tensor`."""


def benchmark_communication(workload: Workload) -> dict[str, Any] | None:
    """Measure every method at every stage and accumulation.

    Returns:
        The processes and one row per case; None on other ranks than 0.

    Raises:
        ConfigError: the model or the processes cannot be cut like that.
    """
    world = distributed.start(10.0)
    cases = product(workload.methods, workload.stages, workload.accumulations)
    rows = [_measure(workload, *case, world) for case in cases]
    distributed.stop()
    if not world.is_main:
        return None
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
    sizes = {"processes": world.world_size, "tensor": workload.tensor}
    return {**sizes, "device": name, "rows": rows}


def _measure(
    workload: Workload, method: str, stage: int, accumulation: int, world: Topology
) -> dict[str, Any]:
    config = _run_config(workload, method, accumulation, world)
    topology = share_models(world, config)
    groups = _named_groups(topology)
    zero = resolve_deepspeed_config(
        {"zero_optimization": {"stage": stage}}, config, topology.dp_size
    )
    engine = _engine(workload, config, zero, topology)
    expected = _expected(workload, config, zero, topology)
    size = (config.train.micro_batch_size, config.train.seq_length + 1)
    # processes that share a copy of the model read the same tokens
    draw = torch.Generator().manual_seed(topology.dp_rank)
    vocabulary = workload.architecture.vocab_size
    tokens = torch.randint(0, vocabulary, (accumulation, *size), generator=draw)

    def step(counted: bool) -> float:
        _settle(topology)
        started = time.perf_counter()
        with recorder if counted else nullcontext():
            recorder.begin_step()
            engine.train_step(tokens.unbind(0))
        _settle(topology)
        return time.perf_counter() - started

    for _ in range(_WARM_UP):
        step(False)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    volumes: Volumes = {}
    for _ in range(workload.steps):
        for counted in (True, False):
            seconds[counted].append(step(counted))
            if counted:
                volumes = recorder.step_volumes()
    plain_s = statistics.median(seconds[False])
    engine.destroy()
    alone_s = _alone(volumes, groups, topology, workload.steps)
    counted = {kind: volume.payload for kind, volume in volumes.items()}
    wire = bytes_of(counted).wire
    return {
        "method": method,
        "stage": stage,
        "accumulation": accumulation,
        "reduction": "step" if zero.reduces_once else workload.reduction,
        "measured": dict(_rows(volumes)),
        "wire_bytes": wire,
        "expected_wire_bytes": bytes_of(expected).wire,
        "exact": _everywhere(counted == expected, topology.device),
        "step_seconds": plain_s,
        "communication_seconds": alone_s,
        "communication_share": min(1.0, alone_s / plain_s),
        "bytes_per_second": wire / alone_s if alone_s else 0.0,
        "counted_step_seconds": statistics.median(seconds[True]),
        "counting_share": _counting_seconds(volumes) / plain_s,
    }


def _named_groups(topology: Topology) -> dict[str, ProcessGroup]:
    """The groups that a step communicates in, by the recorder's name."""
    world, tp = torch.distributed.group.WORLD, topology.tp
    assert world is not None
    if tp.group is None or tp.data_group is None:
        return {"world": world}
    named = {"tp": tp.group, "dp": tp.data_group}
    for name, group in named.items():
        recorder.name_group(group, name)
    return named


def _everywhere(here: bool, device: torch.device) -> bool:
    """Whether something is so on every process."""
    elsewhere = torch.tensor(int(not here), device=device)
    return int(distributed.sum_over_ranks(elsewhere)) == 0


def _run_config(workload: Workload, method: str, accumulation: int, world: Topology) -> RunConfig:
    described: dict[str, Any] = {"name": method}
    known = method_models()
    if method not in known:
        raise ConfigError(f"--methods {method}: must be one of {', '.join(known)}")
    if "rank" in known[method].model_fields:
        described["rank"] = workload.rank
    micro = workload.micro_batch_size
    copies = max(1, world.world_size // workload.tensor)
    config = RunConfig.model_validate(
        {
            "output_dir": "unused",
            "model": "unused",
            "deepspeed": "unused",
            "method": described,
            "train": {
                "steps": 1000,
                "seq_length": workload.seq_length,
                "micro_batch_size": micro,
                "global_batch_size": micro * accumulation * copies,
                "precision": workload.precision,
                "gradient_reduction": workload.reduction,
            },
            "parallel": {"tensor": workload.tensor},
        }
    )
    for problem in heads_divide_over_tensor(config.parallel, workload.architecture):
        raise ConfigError(f"--tensor {problem.message}")
    return config


def _engine(
    workload: Workload, config: RunConfig, zero: ZeroSettings, topology: Topology
) -> TrainEngine:
    method, train, tp = plan_phases(config)[-1].method, config.train, topology.tp
    architecture, device = workload.architecture, topology.device
    partitioner = build_partitioner(zero, tp=tp)
    draw = InitialWeights(architecture, train.seed)
    model = build_model(architecture, method, train, draw, device, partitioner, tp)
    exact = None if partitioner is None else partitioner.finish()
    engine = TrainEngine(model, method, config, zero, lambda: None, exact, tp)
    engine.set_learning_rates({"dense": 1e-4, "adapter": 1e-4})
    return engine


def _expected(
    workload: Workload, config: RunConfig, zero: ZeroSettings, topology: Topology
) -> dict[Traffic, int]:
    method, tp = plan_phases(config)[-1].method, topology.tp
    model = sharded_meta_model(workload.architecture, method, config.train, tp)
    groups = [group.parameters for group in method.parameter_groups(model)]
    once, copies = zero.reduces_once, topology.dp_size
    if tp.size == 1:
        return expected_payloads(model, groups, zero, copies, once=once)
    moved = expected_payloads(model, groups, zero, copies, once=once, group="dp")
    share = shares_by_rank(model, groups, zero.stage, copies)[topology.dp_rank]
    tokens = config.train.micro_batch_size * config.train.seq_length
    return moved | tensor_payloads(model, zero, tokens, tp.size, share, len(groups))


def _rows(volumes: Volumes) -> Iterator[tuple[str, dict[str, float]]]:
    """Calls, payload and wire bytes by phase, group and operation."""
    for kind, volume in sorted(volumes.items()):
        name = f"{kind.phase} {kind.group} {kind.operation} {kind.dtype}"
        wire = wire_bytes(kind.operation, volume.payload, kind.size)
        yield name, {"calls": volume.calls, "payload": volume.payload, "wire": wire}


def _counting_seconds(volumes: Volumes) -> float:
    group = torch.distributed.group.WORLD
    assert group is not None
    return counting_seconds(group) * sum(volume.calls for volume in volumes.values())


def _alone(
    volumes: Volumes, groups: dict[str, ProcessGroup], topology: Topology, repeats: int
) -> float:
    """Seconds of a step's collectives one after the other, the fastest of `repeats`."""
    calls = [
        call
        for kind, volume in volumes.items()
        for call in _calls(kind, volume, groups[kind.group], topology.device)
    ]
    best = float("inf")
    for _ in range(repeats):
        _settle(topology)
        started = time.perf_counter()
        for call in calls:
            call()
        _settle(topology)
        best = min(best, time.perf_counter() - started)
    return best


def _calls(
    kind: Traffic, volume: Any, group: ProcessGroup, device: torch.device
) -> list[Callable[[], Any]]:
    """The same number of calls with the same payload each, on average."""
    dtype = getattr(torch, kind.dtype, torch.uint8)
    size = -(-volume.payload // (volume.calls * dtype.itemsize * kind.size))
    whole = torch.zeros(max(1, size) * kind.size, dtype=dtype, device=device)
    part = whole.new_zeros(max(1, size))
    runs: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: torch.distributed.all_reduce(whole, group=group),
        "all_gather": lambda: torch.distributed.all_gather_into_tensor(whole, part, group=group),
        "reduce_scatter": lambda: torch.distributed.reduce_scatter_tensor(part, whole, group=group),
    }
    return [runs[kind.operation]] * volume.calls


def _settle(topology: Topology) -> None:
    """Every process is here and its device idle."""
    if topology.device.type == "cuda":
        torch.cuda.synchronize()
    distributed.barrier()


def plot_benchmark(found: dict[str, Any], path: Path) -> None:
    """Wire bytes per step and process, measured, with the prediction as marks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = found["rows"]
    figure = Figure(figsize=(2.5 + 0.45 * len(rows), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(rows))
    axes.bar(places, [row["wire_bytes"] / 1e6 for row in rows], color="tab:blue", label="measured")
    predicted = [row["expected_wire_bytes"] / 1e6 for row in rows]
    axes.plot(places, predicted, "k_", markersize=14, label="closed form")
    labels = [f"{row['method']}\nZeRO {row['stage']}, x{row['accumulation']}" for row in rows]
    axes.set_xticks(list(places), labels, rotation=90)
    axes.set_ylabel(
        f"MB per step and process, {found['processes']} processes, tensor {found['tensor']}"
    )
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
