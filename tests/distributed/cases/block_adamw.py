"""Moments in eight bits at every stage, beside moments in 32 bits."""

from __future__ import annotations

from typing import Any

import torch

from relora_ds.parallel.topology import Topology
from tests.harness.build import STAGES, Training
from tests.harness.runs import EVENTFUL, eventful, train_eventful

RATES = {"dense": 1e-2, "adapter": 1e-2}
_STAGES = {"relora": STAGES, "switchlora": (0, 3), "sltrain": (1, 2)}
CELLS = [(name, stage) for name in EVENTFUL for stage in _STAGES.get(name, STAGES)]


def figures(topology: Topology) -> dict[str, Any]:
    """Every method, at every stage together, and with updates within the backward pass."""
    found: dict[str, Any] = {}
    for name, stage in CELLS:
        plain, exact = train(topology, name, "adamw", stage)
        own, coded = train(topology, name, "adamw8bit", stage)
        pairs = zip(coded, exact, strict=True)
        gaps = [torch.stack([(a - b).square().sum(), b.square().sum()]) for a, b in pairs]
        total = torch.stack(gaps).sum(0)
        torch.distributed.all_reduce(total)
        distance = float((total[0] / total[1]).sqrt())
        found[f"{name}/{stage}"] = own | {"plain": plain, "distance": distance}
        if f"{name}/per_layer" not in found:
            layered, _ = train(topology, name, "adamw8bit", stage=0, per_layer=True)
            found[f"{name}/per_layer"] = layered
    return found


def train(
    topology: Topology, method: str, optimizer: str, stage: int, per_layer: bool = False
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """What a run found, and this rank's masters after it."""
    config = eventful(method, {"per_layer_update": per_layer}, {"name": optimizer, "eps": 1e-5})
    run = Training(config, topology, {"stage": stage})
    found = train_eventful(run, RATES)
    masters = [place.master().clone() for place in run.engine.layout.placements.values()]
    run.destroy()
    return found, masters
