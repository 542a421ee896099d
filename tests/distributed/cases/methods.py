"""Methods without events at every stage, beside the method's own modules in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from relora_ds.config.methods.relora import ReLoRAConfig
from relora_ds.config.sections import OptimizerConfig
from relora_ds.methods.build import build_model
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.parallel.topology import Topology
from tests.harness.build import STAGES, TINY, batches
from tests.harness.reference import PlainAdamW, PlainReLoRA
from tests.harness.runs import RATES, STEPS, WARMUP, clipped, start, train_observed

METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    # a scale of 2: the default of 32 / 3 amplifies rounding past the tolerance
    "lora": {"name": "lora", "rank": 3, "alpha": 6},
    "lora_balanced": {"name": "lora", "rank": 3, "init": "balanced"},
    "lora_scaling": {"name": "lora", "rank": 3, "trainable_scaling": True},
    "low_rank": {"name": "low_rank", "rank": 3},
}


def reference(method: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Parameters and losses of the method's own modules, trained by the textbook."""
    config = clipped(METHODS[method])
    phase = plan_phases(config)[-1]
    draw = InitialWeights(TINY, config.train.seed)
    model = build_model(TINY, phase.method, config.train, draw, torch.device("cpu"))
    optimizer = PlainAdamW(OptimizerConfig().betas, 1e-3, 0.1)
    # a cycle longer than the run: the plain cosine, and no restart
    never = ReLoRAConfig(name="relora", merge_every=10_000)
    plain = PlainReLoRA(model, never, 42, STEPS, RATES, 0.3, WARMUP, optimizer)
    losses = plain.train(batches(STEPS))
    return {n: p.detach() for n, p in model.named_parameters()}, losses


def figures(topology: Topology) -> dict[str, Any]:
    """Every method at every stage; full-rank training also with torch's own AdamW."""
    found: dict[str, Any] = {}
    for name, method in METHODS.items():
        expected, losses = reference(name)
        for stage in STAGES:
            for optimizer in ("adamw", "torch_adamw") if name == "full" else ("adamw",):
                run = start(clipped(method, name=optimizer), stage, topology)
                found[f"{name}/{stage}/{optimizer}"] = train_observed(run) | {
                    "difference": run.difference(expected),
                    "reference_losses": losses,
                }
                run.destroy()
    return found
