"""Moments in eight bits at every stage against 32-bit ones, one start on two ranks.

Run by `test_block_adamw.py`; rank 0 writes the figures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.deepspeed.partition import build_partitioner
from relora_ds.engine.engine import TrainEngine
from relora_ds.methods.build import build_model
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.parallel.topology import Topology
from relora_ds.planning.memory_report import closed_form, storage_plan
from tests.distributed.per_layer_worker import METHODS, STEPS
from tests.distributed.relora_worker import ARCHITECTURE, BATCH, SEQUENCE, batches, own_share

STAGES = (0, 1, 2, 3)


def run_config(method: str, optimizer: str, per_layer: bool) -> RunConfig:
    return RunConfig.model_validate_json(
        json.dumps(
            {
                "output_dir": "unused",
                "model": "unused",
                "deepspeed": "unused",
                "method": METHODS[method],
                "train": {
                    "steps": STEPS,
                    "seq_length": SEQUENCE,
                    "micro_batch_size": 2,
                    "global_batch_size": BATCH,
                    "precision": "fp32",
                    "per_layer_update": per_layer,
                },
                "optimizer": {"name": optimizer, "eps": 1e-5, "weight_decay": 0.1},
            }
        )
    )


def train(
    config: RunConfig, stage: int, topology: Topology
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """What a run found, and this rank's masters after it."""
    phase = plan_phases(config)[-1]
    zero = {"zero_optimization": {"stage": stage}}
    resolved = resolve_deepspeed_config(zero, config, topology.dp_size)
    draw = InitialWeights(ARCHITECTURE, config.train.seed)
    partitioner = build_partitioner(resolved)
    model = build_model(
        ARCHITECTURE, phase.method, config.train, draw, topology.device, partitioner
    )
    exact = None if partitioner is None else partitioner.finish()
    engine = TrainEngine(model, phase.method, config, resolved, lambda: None, exact)
    losses, resets = [], []
    with torch.no_grad():
        phase.method.attach(engine.state, engine.model)
    for step, tokens in enumerate(batches()[:STEPS]):
        factor = phase.method.lr_multiplier(step, phase.schedule)
        engine.set_learning_rates({"dense": factor * 1e-2, "adapter": factor * 1e-2})
        with torch.no_grad():
            phase.method.before_step(engine.state, engine.model, step)
        loss, _ = engine.train_step(own_share(tokens, topology))
        with torch.no_grad():
            event = phase.method.after_step(engine.state, engine.model, step + 1)
        if event is not None:
            resets.append(event.moments_reset_fraction)
        losses.append(float(distributed.mean_over_ranks(loss.clone())))
    engine.check_replicas()
    plan = storage_plan(config, stage, topology.dp_size, topology.device)
    found = {
        "losses": losses,
        "resets": resets,
        "states": engine.memory.measured and engine.memory.measured.states,
        "expected": closed_form(config, ARCHITECTURE, phase.method, plan).states,
    }
    masters = [place.master().clone() for place in engine.layout.placements.values()]
    engine.destroy()
    return found, masters


def main(output: Path) -> None:
    topology = distributed.start(5.0)
    figures: dict[str, Any] = {}
    for name in METHODS:
        for stage in STAGES:
            plain, exact = train(run_config(name, "adamw", False), stage, topology)
            found, coded = train(run_config(name, "adamw8bit", False), stage, topology)
            gaps = torch.stack(
                [
                    torch.stack([(a - b).square().sum(), b.square().sum()])
                    for a, b in zip(coded, exact, strict=True)
                ]
            ).sum(0)
            torch.distributed.all_reduce(gaps)
            figures[f"{name}/{stage}"] = found | {
                "plain": plain,
                "distance": float((gaps[0] / gaps[1]).sqrt()),
            }
        figures[f"{name}/per_layer"], _ = train(run_config(name, "adamw8bit", True), 0, topology)
    if topology.is_main:
        output.write_text(json.dumps(figures))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
