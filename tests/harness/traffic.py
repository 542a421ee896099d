"""Recorded traffic of training steps beside its closed form."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from relora_ds.accounting.recorder import Volume, recorder
from relora_ds.accounting.zero_traffic import bytes_of, expected_payloads
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.methods.build import meta_model
from relora_ds.methods.interface import optimizer_groups
from relora_ds.parallel.topology import Topology
from tests.harness.build import UNEVEN, VOCAB, Training, run_config

MICRO, SEQUENCE = 2, 8


def uneven(
    method: str,
    precision: str,
    accumulation: int,
    clip: float = 1.0,
    copies: int = 2,
    **train: object,
) -> RunConfig:
    """A run of the model of which no part divides by four, on this many data-parallel ranks."""
    described: dict[str, object] = {"name": method}
    if method != "full":
        described["rank"] = 3
    if method == "relora":
        described["merge_every"] = 4
    return run_config(
        described,
        train={
            "steps": 8,
            "seq_length": SEQUENCE,
            "micro_batch_size": MICRO,
            "global_batch_size": MICRO * accumulation * copies,
            "precision": precision,
            **train,
        },
        optimizer={"lr": 1e-3, "clip": clip},
        schedule={"warmup_steps": 1},
    )


def expectation(run: Training) -> tuple[list[list[torch.nn.Parameter]], dict[Any, int]]:
    """Parameters of every group, and payloads of an update by kind of collective."""
    meta = meta_model(run.architecture, run.method, run.config.train)
    groups = [
        group.parameters for group in optimizer_groups(run.method, run.config.optimizer, meta)
    ]
    return groups, expected_payloads(meta, groups, run.zero, run.topology.dp_size)


def record(
    topology: Topology,
    config: RunConfig,
    zero: Mapping[str, object],
    architecture: ModelConfig = UNEVEN,
    **deepspeed: object,
) -> dict[str, Any]:
    """Recorded and predicted bytes of two steps of one engine.

    Returns:
        `elements` of every group and `sizes` of every parameter; the `expected` payloads and
        `expected_bytes`; per step the `recorded` ones and `recorded_bytes`; of the last step the
        `calls` by operation, and those `profiled` by torch, which says nothing at stage 3.
    """
    with recorder.phase("setup"):
        run = Training(config, topology, zero, architecture, deepspeed=deepspeed)
    groups, expected = expectation(run)
    tokens = torch.randint(0, VOCAB, (MICRO, SEQUENCE + 1))
    micro_batches = [tokens] * run.zero.accumulation
    run.engine.set_learning_rates({"dense": 1e-3, "adapter": 1e-3})
    cut = run.zero.stage == 3
    if cut:  # it learns the order of modules in the first two micro-batches
        for _ in range(1 if len(micro_batches) > 1 else 2):
            run.train_step(micro_batches)
    steps = []
    # gloo reports a reduce-scatter as two all-reduces, so at stage 3 its events say nothing
    for profiled in (False, not cut):  # the first step is where an engine might do more
        recorder.begin_step()
        with profile(activities=[ProfilerActivity.CPU]) if profiled else nullcontext() as profiler:
            run.train_step(micro_batches)
        steps.append((recorder.step_volumes(), recorder.step_bytes()))
    run.destroy()
    return {
        "elements": [sum(p.numel() for p in group) for group in groups],
        "sizes": [p.numel() for group in groups for p in group],
        "expected": listed(expected),
        "expected_bytes": bytes_of(expected),
        "recorded": [listed({k: v.payload for k, v in volumes.items()}) for volumes, _ in steps],
        "recorded_bytes": [totals for _, totals in steps],
        "calls": _calls(steps[-1][0]),
        "profiled": _profiled(profiler) if isinstance(profiler, profile) else None,
    }


def listed(payloads: Mapping[Any, Any]) -> dict[str, Any]:
    """Values by the words of a kind of collective."""
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
