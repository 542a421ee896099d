"""bf16 weights that are their own masters, beside masters, on one or two ranks of one batch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from relora_ds.config.schema import RunConfig
from relora_ds.parallel.topology import Topology
from tests.harness.build import BATCH, Training, changed
from tests.harness.resume import interrupted
from tests.harness.runs import RATES, eventful, switchlora, train_eventful

CASES = {
    "full": ("full", "adamw"),
    "relora": ("relora", "adamw8bit"),
    "sltrain": ("sltrain", "adamw8bit"),
    "switchlora": ("switchlora", "adamw"),
    "switchlora_8bit": ("switchlora", "adamw8bit"),
}


def figures(topology: Topology, directory: Path) -> dict[str, Any]:
    """Every case, one with accumulation, and a run that is interrupted."""
    # half of the batch at a time: two micro-batches of one process, or one of each of two
    found = {name: compare(topology, name, BATCH // 2) for name in CASES}
    found["accumulated"] = compare(topology, "sltrain", 1)
    found["resume"] = interrupted(topology, without_masters(switchlora("bf16")), 0, directory)
    return found


def without_masters(config: RunConfig) -> RunConfig:
    """The run with bf16 weights that the optimizer steps themselves."""
    return changed(config, "train", per_layer_update=True, master_weights=False)


def compare(topology: Topology, name: str, micro: int) -> dict[str, Any]:
    """What the run without masters found, with the `bits` of its weights; `plain`, with them."""
    method, optimizer = CASES[name]
    config = eventful(
        method,
        {"precision": "bf16", "micro_batch_size": micro, "per_layer_update": True},
        {"name": optimizer, "lr": 2e-2, "eps": 1e-3, "clip": 0.05},
    )
    both, weights = [], []
    for each in (config, without_masters(config)):
        run = Training(each, topology, {"stage": 0})
        both.append(train_eventful(run, RATES))
        weights.append(run.exact())
        run.destroy()
    (plain, own), (exact, parameters) = both, weights
    content = hashlib.sha256()
    for value in parameters.values():
        content.update(value.numpy().tobytes())
    distance = sum(float((parameters[n] - v).square().sum()) for n, v in exact.items())
    norm = sum(float(v.square().sum()) for v in exact.values())
    return own | {
        "plain": plain,
        "bits": content.hexdigest(),
        "distance": (distance / norm) ** 0.5,
        "in_bf16": sum(torch.equal(v, v.bfloat16().float()) for v in parameters.values()),
        "edited": 14 if method in ("relora", "switchlora") else 0,  # exact beyond bf16
        "parameters": len(parameters),
    }
