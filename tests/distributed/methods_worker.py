"""Every method without events at every stage against plain single-process training, one start.

Run by `test_methods.py` on two ranks; rank 0 writes the figures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from relora_ds.config.methods.relora import ReLoRAConfig
from relora_ds.config.sections import OptimizerConfig
from relora_ds.engine import distributed
from relora_ds.methods.build import build_model
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights
from tests.distributed import relora_worker as common
from tests.distributed.reference import PlainAdamW, PlainReLoRA

METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    # a scale of 2: the default of 32 / 3 amplifies rounding past the tolerance
    "lora": {"name": "lora", "rank": 3, "alpha": 6},
    "lora_balanced": {"name": "lora", "rank": 3, "init": "balanced"},
    "lora_scaling": {"name": "lora", "rank": 3, "trainable_scaling": True},
    "low_rank": {"name": "low_rank", "rank": 3},
}


def config_of(method: dict[str, Any], optimizer: str) -> Any:
    base = common.run_config(0, common.RESETS["zero"], "fp32").model_dump(mode="json")
    base["method"] = method
    base["optimizer"]["name"] = optimizer
    return type(common.run_config(0, common.RESETS["zero"], "fp32")).model_validate_json(
        json.dumps(base)
    )


def reference(method: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The method's own modules, trained in one process by the textbook."""
    config = config_of(method, "adamw")
    phase = plan_phases(config)[-1]
    draw = InitialWeights(common.ARCHITECTURE, config.train.seed)
    device = torch.device("cpu")
    model = build_model(common.ARCHITECTURE, phase.method, config.train, draw, device)
    optimizer = PlainAdamW(OptimizerConfig().betas, 1e-3, 0.1)
    # a cycle longer than the run: the plain cosine, and no restart
    never = ReLoRAConfig(name="relora", merge_every=10_000)
    lrs = {"dense": 2e-2, "adapter": 3e-2}
    plain = PlainReLoRA(model, never, 42, common.STEPS, lrs, 0.3, common.WARMUP, optimizer)
    losses = plain.train(common.batches())
    return {n: p.detach() for n, p in model.named_parameters()}, losses


def main(output: Path) -> None:
    topology = distributed.start(5.0)
    figures: dict[str, Any] = {}
    for name, method in METHODS.items():
        expected, losses = reference(method)
        for stage in common.STAGES:
            for optimizer in ("adamw", "torch_adamw") if name == "full" else ("adamw",):
                phase, engine = common.build(stage, config_of(method, optimizer), topology)
                found = common.train(phase, engine, topology)
                found["difference"] = common.difference(engine, expected)
                found["replicas"] = common.replicas_differ(engine)
                found["reference_losses"] = losses
                figures[f"{name}/{stage}/{optimizer}"] = found
                engine.destroy()
    if topology.is_main:
        output.write_text(json.dumps(figures))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
