"""Recorded traffic of training steps beside the closed form and torch's profiler, one start.

Run by `test_communication.py` on two ranks; rank 0 writes the figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.distributed import ProcessGroup, distributed_c10d
from torch.profiler import ProfilerActivity, profile

from relora_ds.accounting.collectives import CALLS
from relora_ds.accounting.recorder import Volume, recorder
from relora_ds.accounting.zero_traffic import bytes_of, expected_payloads
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.deepspeed.partition import build_partitioner
from relora_ds.engine.engine import TrainEngine
from relora_ds.methods.build import build_model, meta_model
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.parallel.topology import Topology

STAGES, PRECISIONS, METHODS, ACCUMULATIONS = (0, 1, 2), ("fp32", "bf16"), ("full", "relora"), (1, 2)
TIMEOUT_MINUTES = 5.0
MICRO, SEQUENCE, VOCAB = 2, 8, 61
# no group's size is a multiple of 4: padding must show
ARCHITECTURE = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=22,
    intermediate_size=27,
    num_hidden_layers=1,
    num_attention_heads=11,
    num_key_value_heads=11,
    head_dim=2,
    max_position_embeddings=16,
)
# keys of the ZeRO file that change what is moved, and the rest of the case
VARIANTS: dict[str, tuple[dict[str, Any], int, str, float]] = {
    "no clipping, fp32, stage 0": ({}, 0, "fp32", 0.0),
    "no clipping, bf16, stage 1": ({}, 1, "bf16", 0.0),
    "to owners": ({"use_multi_rank_bucket_allreduce": False}, 2, "fp32", 1.0),
    "to owners, stage 1": ({"use_multi_rank_bucket_allreduce": False}, 1, "fp32", 1.0),
    "no reduce-scatter": (
        {"reduce_scatter": False, "use_multi_rank_bucket_allreduce": False}, 2, "fp32", 1.0
    ),
    "small buckets": ({"reduce_bucket_size": 100}, 2, "bf16", 1.0),
}  # fmt: skip


def run_config(
    method: str, precision: str, accumulation: int, clip: float, **train: Any
) -> RunConfig:
    described: dict[str, Any] = {"name": method}
    if method != "full":
        described["rank"] = 3
    if method == "relora":
        described["merge_every"] = 4
    return RunConfig.model_validate_json(
        json.dumps(
            {
                "output_dir": "unused",
                "model": "unused",
                "deepspeed": "unused",
                "method": described,
                "train": {
                    "steps": 8,
                    "seq_length": SEQUENCE,
                    "micro_batch_size": MICRO,
                    "global_batch_size": MICRO * accumulation * 2,
                    "precision": precision,
                    **train,
                },
                "optimizer": {"lr": 1e-3, "clip": clip},
                "schedule": {"warmup_steps": 1},
            }
        )
    )


def record(
    config: RunConfig, zero: Mapping[str, Any], topology: Topology, **extra: Any
) -> dict[str, Any]:
    """Recorded and predicted bytes of two steps of one engine."""
    method = plan_phases(config)[-1].method
    architecture = ARCHITECTURE.model_copy(update=extra.pop("architecture", {}))
    draw = InitialWeights(architecture, config.train.seed)
    resolved = resolve_deepspeed_config(
        {"zero_optimization": zero, **extra}, config, topology.dp_size
    )
    partitioner = build_partitioner(resolved)
    model = build_model(architecture, method, config.train, draw, topology.device, partitioner)
    with recorder.phase("setup"):
        exact = None if partitioner is None else partitioner.finish()
        engine = TrainEngine(model, method, config, resolved, _no_probe, exact)
    meta = meta_model(architecture, method, config.train)
    groups = [group.parameters for group in method.parameter_groups(meta)]
    once = config.train.gradient_reduction == "step"
    expected = expected_payloads(meta, groups, resolved, topology.dp_size, once=once)
    tokens = torch.randint(0, VOCAB, (MICRO, SEQUENCE + 1))
    micro_batches = [tokens] * resolved.accumulation
    engine.set_learning_rates({"dense": 1e-3, "adapter": 1e-3})
    if (
        partitioner is not None
    ):  # stage 3 learns the order of modules in the first two micro-batches
        for _ in range(1 if len(micro_batches) > 1 else 2):
            engine.train_step(micro_batches)
    steps = []
    # gloo reports a reduce-scatter as two all-reduces, so at stage 3 its events say nothing
    for profiled in (False, partitioner is None):  # the first step is where an engine might do more
        recorder.begin_step()
        with profile(activities=[ProfilerActivity.CPU]) if profiled else nullcontext() as profiler:
            engine.train_step(micro_batches)
        steps.append((recorder.step_volumes(), recorder.step_bytes()))
    engine.destroy()
    return {
        "elements": [sum(p.numel() for p in group) for group in groups],
        "sizes": [p.numel() for group in groups for p in group],
        "expected": _listed(expected),
        "expected_bytes": bytes_of(expected),
        "recorded": [_listed({k: v.payload for k, v in volumes.items()}) for volumes, _ in steps],
        "recorded_bytes": [totals for _, totals in steps],
        "calls": _calls(steps[-1][0]),
        "profiled": _profiled(profiler) if isinstance(profiler, profile) else None,
    }


def trained(stage: int, precision: str, reduction: str, topology: Topology) -> list[list[float]]:
    """Losses and gradient norms of four updates of three micro-batches that differ by rank."""
    config = run_config("relora", precision, 3, 0.5, gradient_reduction=reduction)
    method = plan_phases(config)[-1].method
    resolved = resolve_deepspeed_config({"zero_optimization": {"stage": stage}}, config, 2)
    partitioner = build_partitioner(resolved)
    draw = InitialWeights(ARCHITECTURE, config.train.seed)
    model = build_model(ARCHITECTURE, method, config.train, draw, topology.device, partitioner)
    exact = None if partitioner is None else partitioner.finish()
    engine = TrainEngine(model, method, config, resolved, _no_probe, exact)
    generator = torch.Generator().manual_seed(topology.rank)
    found = []
    for _ in range(4):
        engine.set_learning_rates({"dense": 1e-2, "adapter": 1e-2})
        tokens = torch.randint(0, VOCAB, (3, MICRO, SEQUENCE + 1), generator=generator)
        loss, norm = engine.train_step(tokens.unbind(0))
        found.append([float(distributed.mean_over_ranks(loss)), float(norm)])
    assert engine.completed_steps() == 4
    engine.destroy()
    return found


def aliases() -> dict[str, Any]:
    """One collective on each way to it; each must be counted once."""
    recorder.begin_step()
    value, parts = torch.ones(3), [torch.zeros(3), torch.zeros(3)]
    deepspeed.comm.all_reduce(value)
    torch.distributed.all_reduce(tensor=value)
    torch.distributed.distributed_c10d.all_reduce(value)
    torch.distributed.all_gather(tensor_list=parts, tensor=value)
    # a function object that the backend looked up before the recorder was started
    deepspeed.comm.comm.cdb.all_gather_into_tensor(output_tensor=torch.zeros(6), input_tensor=value)
    deepspeed.comm.comm.cdb.reduce_scatter_tensor(torch.zeros(3), torch.zeros(6))
    torch.distributed.all_to_all(parts, [torch.zeros(3), torch.zeros(3)])
    distributed.barrier()
    return _listed({k: (v.calls, v.payload) for k, v in recorder.step_volumes().items()})


def _no_probe() -> None:
    return None


def _listed(payloads: Mapping[Any, Any]) -> dict[str, Any]:
    return {" ".join(map(str, kind)): value for kind, value in sorted(payloads.items())}


def _calls(volumes: Mapping[Any, Volume]) -> dict[str, int]:
    calls: dict[str, int] = {}
    for kind, volume in volumes.items():
        calls[kind.operation] = calls.get(kind.operation, 0) + volume.calls
    return calls


def _profiled(profiler: profile) -> dict[str, int]:
    """Gloo's own events, by operation."""
    events: dict[str, int] = {}
    for event in profiler.events() or []:
        if event.name.startswith("gloo:"):
            name = event.name.removeprefix("gloo:")
            events[name] = events.get(name, 0) + 1
    return events


def group_timeouts() -> list[float]:
    """Seconds after which each process group gives up, DeepSpeed's own groups among them."""
    groups = distributed_c10d._world.pg_map
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return [backend.options._timeout.total_seconds() for backend in backends]


def main(output: Path) -> None:
    topology = distributed.start(TIMEOUT_MINUTES)
    originals = {name: vars(ProcessGroup).get(name) for name in CALLS}
    early = recorder.volumes()
    figures: dict[str, Any] = {}
    with recorder:
        figures["aliases"] = aliases()
        for method in METHODS:
            for stage in STAGES:
                for precision in PRECISIONS:
                    for accumulation in ACCUMULATIONS:
                        config = run_config(method, precision, accumulation, 1.0)
                        case = f"{method}/{stage}/{precision}/{accumulation}"
                        figures[case] = record(config, {"stage": stage}, topology)
        for name, (keys, stage, precision, clip) in VARIANTS.items():
            config = run_config("relora", precision, 2, clip)
            figures[name] = record(config, {"stage": stage, **keys}, topology)
        config = run_config("relora", "bf16", 2, 1.0)
        figures["fp32 gradients"] = record(
            config, {"stage": 2}, topology, communication_data_type="fp32"
        )
        config = run_config("relora", "fp32", 2, 1.0)
        figures["bf16 gradients"] = record(
            config, {"stage": 1}, topology, communication_data_type="bf16"
        )
        config = run_config("relora", "bf16", 4, 1.0, gradient_reduction="step")
        figures["one reduction"] = record(config, {"stage": 2}, topology)
    figures["group timeouts"] = group_timeouts()
    figures["trained"] = {
        f"{stage}/{precision}/{reduction}": trained(stage, precision, reduction, topology)
        for stage in (1, 2, 3)
        for precision in PRECISIONS
        for reduction in ("micro_batch", "step")
    }
    figures["restored"] = all(vars(ProcessGroup).get(n) is f for n, f in originals.items())
    before = recorder.volumes()
    distributed.barrier()
    figures["silent_when_off"] = not early and recorder.volumes() == before
    if topology.is_main:
        output.write_text(json.dumps(figures))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
