"""Bytes and time of communication by method, ZeRO stage and accumulation. See --help.

Measures what the processes of this launch exchange, beside the closed form. Writes OUTPUT.json and
OUTPUT.png and prints a table.

Volumes come from steps with the recorder, times from steps without it, in alternation within one
engine; what counting costs is measured by the call, because it drowns in the noise of steps. What
communication alone takes is timed on the same collectives with nothing in between: its share of a
step is what would be gained at most if it overlapped with everything else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed import ProcessGroup

from relora_ds.accounting.collectives import wire_bytes
from relora_ds.accounting.matrix_traffic import Place, matrix_traffic
from relora_ds.accounting.recorder import Traffic, Volume, Volumes, counting_seconds, recorder
from relora_ds.accounting.tp_traffic import GroupWork, shares_by_rank, tensor_payloads
from relora_ds.accounting.zero_traffic import Payloads, bytes_of, expected_payloads
from relora_ds.cli.parser import run_tool, tool_parser
from relora_ds.config.architecture import read_model_config
from relora_ds.config.methods.catalogue import method_models
from relora_ds.config.model import ModelConfig
from relora_ds.config.rules.tensors import heads_divide_over_tensor
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.assemble import build_engine
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.errors import ConfigError
from relora_ds.methods.build import sharded_meta_model
from relora_ds.methods.interface import matrix_rules
from relora_ds.methods.registry import plan_phases
from relora_ds.parallel.footprint import UpdateSize
from relora_ds.parallel.topology import Topology, share_models
from relora_ds.parallel.zero import ZeroSettings

_EXAMPLE = """
example:
  torchrun --nproc_per_node 2 benchmarks/communication.py \\
      --model configs/model/llama_quickstart.json --methods full relora --stages 1 2 3 --rank 32
"""
# Stage 3 learns the order of modules in the first two micro-batches
_WARM_UP = 3


@dataclass(frozen=True)
class Workload:
    """What is measured, on the processes that there are."""

    architecture: ModelConfig
    methods: Sequence[str]
    stages: Sequence[int]
    accumulation: Sequence[int]
    rank: int
    """Rank r of the adapters."""
    precision: str
    micro_batch_size: int
    seq_length: int
    reduction: str = "micro_batch"
    """`train.gradient_reduction`."""
    steps: int = 6
    """Timed steps of either kind."""
    tensor: int = 1
    """`parallel.tensor`."""


@dataclass(frozen=True)
class Sent:
    """Collectives of one kind in a step."""

    calls: int
    payload: int
    wire: float
    """Bytes that this process sends."""


@dataclass(frozen=True)
class Row:
    """What one case measured."""

    method: str
    stage: int
    accumulation: int
    reduction: str
    """`step` where gradients are reduced once per update."""
    measured: dict[str, Sent]
    """By phase, group, operation and type."""
    wire_bytes: float
    expected_wire_bytes: float
    exact: bool
    """What was counted is the closed form, on every process."""
    step_seconds: float
    communication_seconds: float
    communication_share: float
    bytes_per_second: float
    counted_step_seconds: float
    counting_share: float


@dataclass(frozen=True)
class Measurements:
    """A launch of the benchmark."""

    processes: int
    tensor: int
    """`parallel.tensor`."""
    device: str
    rows: list[Row]


def main() -> None:
    given = vars(_parser().parse_args())
    del given["local_rank"]  # a launcher's, which also sets it in the environment
    output, architecture = given.pop("output"), read_model_config(given.pop("model"))
    found = benchmark_communication(Workload(architecture, **given))
    if found is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(asdict(found), indent=1) + "\n")
        _plot(found, output.with_suffix(".png"))
        _show(found)


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, _EXAMPLE)
    add = parser.add_argument
    add("--model", required=True, help="JSON with HF LlamaConfig keys")
    methods = ["full", "relora", "switchlora"]
    add("--methods", nargs="+", default=methods, choices=list(method_models()))
    add("--stages", nargs="+", type=int, default=[0, 1, 2, 3], choices=range(4))
    add("--accumulation", nargs="+", type=int, default=[1, 4])
    add("--rank", type=int, default=32, help="of the adapters")
    add("--precision", default="bf16", choices=("bf16", "fp32"))
    add("--micro-batch-size", type=int, default=2)
    add("--seq-length", type=int, default=128)
    reductions, means = ("micro_batch", "step"), "train.gradient_reduction"
    add("--reduction", default="micro_batch", choices=reductions, help=means)
    add("--steps", type=int, default=6, help="timed steps of either kind")
    add("--tensor", type=int, default=1, help="processes that share a model")
    add("--output", type=Path, default=Path("runs/benchmark_communication"))
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def benchmark_communication(workload: Workload) -> Measurements | None:
    """Measure every method at every stage and accumulation.

    Returns:
        One row per case; None on other ranks than 0.

    Raises:
        ConfigError: the model or the processes cannot be cut like that.
    """
    world = distributed.start(10.0)
    cases = product(workload.methods, workload.stages, workload.accumulation)
    rows = [_measure(workload, *case, world) for case in cases]
    distributed.stop()
    if not world.is_main:
        return None
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
    return Measurements(world.world_size, workload.tensor, name, rows)


def _measure(
    workload: Workload, method: str, stage: int, accumulation: int, world: Topology
) -> Row:
    config = _run_config(workload, method, accumulation, world)
    topology = share_models(world, config)
    groups = _named_groups(topology)
    source, architecture = {"zero_optimization": {"stage": stage}}, workload.architecture
    zero = resolve_deepspeed_config(source, config, topology.dp_size)
    in_charge = plan_phases(config)[-1].method
    engine = build_engine(architecture, in_charge, config, zero, topology)
    engine.set_learning_rates(dict.fromkeys(("dense", "adapter", "pair"), 1e-4))
    expected = _expected(workload, config, zero, topology, engine.update_size)
    # processes that share a copy of the model read the same tokens
    draw = torch.Generator().manual_seed(topology.dp_rank)
    shape = (accumulation, workload.micro_batch_size, workload.seq_length + 1)
    tokens = torch.randint(0, architecture.vocab_size, shape, generator=draw)

    def step(counted: bool) -> None:
        with recorder if counted else nullcontext():
            recorder.begin_step()
            engine.train_step(tokens.unbind(0))

    for _ in range(_WARM_UP):
        step(False)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    volumes: Volumes = {}
    for _ in range(workload.steps):
        for counted in (True, False):
            seconds[counted].append(_seconds(partial(step, counted), topology))
            if counted:
                volumes = recorder.step_volumes()
    plain_s = statistics.median(seconds[False])
    engine.destroy()
    alone_s = _alone(volumes, groups, topology, workload.steps)
    counted = {kind: volume.payload for kind, volume in volumes.items()}
    wire, calls = bytes_of(counted).wire, sum(volume.calls for volume in volumes.values())
    return Row(
        method=method,
        stage=stage,
        accumulation=accumulation,
        reduction="step" if zero.reduces_once else workload.reduction,
        measured=dict(_sent(volumes)),
        wire_bytes=wire,
        expected_wire_bytes=bytes_of(expected).wire,
        exact=_everywhere(counted == expected, topology.device),
        step_seconds=plain_s,
        communication_seconds=alone_s,
        communication_share=min(1.0, alone_s / plain_s),
        bytes_per_second=wire / alone_s if alone_s else 0.0,
        counted_step_seconds=statistics.median(seconds[True]),
        counting_share=calls * counting_seconds(next(iter(groups.values()))) / plain_s,
    )


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
    elsewhere = distributed.sum_over_ranks(torch.tensor(int(not here), device=device))
    return int(elsewhere) == 0


def _run_config(workload: Workload, method: str, accumulation: int, world: Topology) -> RunConfig:
    described: dict[str, Any] = {"name": method}
    if "rank" in method_models()[method].model_fields:
        described["rank"] = workload.rank
    micro = workload.micro_batch_size
    if workload.tensor < 1:
        raise ConfigError(f"--tensor {workload.tensor} is no number of processes: write 1 or more")
    copies = max(1, world.world_size // workload.tensor)
    config = RunConfig.model_validate(
        {
            **dict.fromkeys(("output_dir", "model", "deepspeed"), "unused"),
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


def _expected(
    workload: Workload,
    config: RunConfig,
    zero: ZeroSettings,
    topology: Topology,
    update: UpdateSize,
) -> Payloads:
    method, tp = plan_phases(config)[-1].method, topology.tp
    model = sharded_meta_model(workload.architecture, method, config.train, tp)
    groups = [group.parameters for group in method.parameter_groups(model)]
    copies = topology.dp_size
    rules = matrix_rules(method, config.optimizer, model)
    place = Place(topology.dp_rank, tp.rank)
    matrices = matrix_traffic(model, groups, rules, zero, (copies, tp.size), place)
    more = {"group": "world" if tp.size == 1 else "dp", "tp_size": tp.size}
    moved = expected_payloads(model, groups, zero, copies, **more, matrices=matrices)
    if tp.size == 1:
        return moved
    share = shares_by_rank(model, groups, zero.stage, copies)[topology.dp_rank]
    work = GroupWork(tp.size, update, share, len(groups), matrices.sharded)
    return moved | tensor_payloads(model, zero, work)


def _sent(volumes: Volumes) -> Iterator[tuple[str, Sent]]:
    """What was sent by phase, group, operation and type."""
    for kind, volume in sorted(volumes.items()):
        name = f"{kind.phase} {kind.group} {kind.operation} {kind.dtype}"
        wire = wire_bytes(kind.operation, volume.payload, kind.size)
        yield name, Sent(volume.calls, volume.payload, wire)


def _alone(
    volumes: Volumes, groups: dict[str, ProcessGroup], topology: Topology, repeats: int
) -> float:
    """Seconds of a step's collectives one after the other, the fastest of `repeats`."""
    calls = [
        call
        for kind, volume in volumes.items()
        for call in _calls(kind, volume, groups[kind.group], topology.device)
    ]

    def one_step() -> None:
        for call in calls:
            call()

    return min(_seconds(one_step, topology) for _ in range(repeats))


def _calls(
    kind: Traffic, volume: Volume, group: ProcessGroup, device: torch.device
) -> list[Callable[[], Any]]:
    """Repeat as many calls as were counted, each with their mean payload."""
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


def _seconds(work: Callable[[], None], topology: Topology) -> float:
    """Time of some work, from when every process is ready until all of them are again."""

    def settle() -> float:
        if topology.device.type == "cuda":
            torch.cuda.synchronize()
        distributed.barrier()
        return time.perf_counter()

    started = settle()
    work()
    return settle() - started


def _plot(found: Measurements, path: Path) -> None:
    """Wire bytes per step and process, measured, with the prediction as marks."""
    from matplotlib.figure import Figure

    rows = found.rows
    figure = Figure(figsize=(2.5 + 0.45 * len(rows), 4.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.bar(places, [row.wire_bytes / 1e6 for row in rows], color="tab:blue", label="measured")
    expected = [row.expected_wire_bytes / 1e6 for row in rows]
    axes.plot(places, expected, "k_", markersize=14, label="closed form")
    labels = [f"{row.method}\nZeRO {row.stage}, x{row.accumulation}" for row in rows]
    axes.set_xticks(list(places), labels, rotation=90)
    axes.set_ylabel(f"MB per step and process, {_launch(found)}")
    axes.legend()
    figure.savefig(path, dpi=150)


def _show(found: Measurements) -> None:
    heads = ("method", "ZeRO", "k", "MB sent", "expected", "exact", "step ms", "comm.", "MB/s")
    table = Table(*heads, "counting")
    for row in found.rows:
        table.add_row(
            row.method,
            str(row.stage),
            str(row.accumulation),
            f"{row.wire_bytes / 1e6:.3f}",
            f"{row.expected_wire_bytes / 1e6:.3f}",
            "yes" if row.exact else "no",
            f"{1e3 * row.step_seconds:.1f}",
            f"{row.communication_share:.0%}",
            f"{row.bytes_per_second / 1e6:.0f}",
            f"{row.counting_share:.2%}",
        )
    Console(highlight=False).print(f"{_launch(found)}, {found.device}", table)


def _launch(found: Measurements) -> str:
    return f"{found.processes} processes, tensor {found.tensor}"


if __name__ == "__main__":
    sys.exit(run_tool(main))
