"""Updates within the backward pass against ordinary ones at stage 0, one start on two ranks.

Run by `test_per_layer.py`; rank 0 writes the figures.
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
from relora_ds.engine.engine import TrainEngine
from relora_ds.engine.handover import exact_parameters
from relora_ds.methods.build import build_model
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.parallel.topology import Topology
from relora_ds.planning.memory_report import closed_form, storage_plan
from tests.distributed.relora_worker import ARCHITECTURE, BATCH, SEQUENCE, batches

STEPS = 10
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "relora": {
        "name": "relora",
        "rank": 3,
        "alpha": 6,
        "merge_every": 4,
        "restart_warmup_steps": 2,
    },
    "low_rank": {"name": "low_rank", "rank": 3},
    "sltrain": {"name": "sltrain", "rank": 3, "scale": 1.0, "sparsity": 0.1},
    # vectors are switched before two of three updates and frozen for two
    "switchlora": {
        "name": "switchlora",
        "rank": 4,
        "interval": 4,
        "freeze_steps": 2,
        "descent_rate": 1.0,
    },
}


def run_config(method: str, precision: str, micro: int, per_layer: bool, clip: float) -> RunConfig:
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
                    "micro_batch_size": micro,
                    "global_batch_size": BATCH,
                    "precision": precision,
                    "per_layer_update": per_layer,
                },
                "optimizer": {"lr": 2e-2, "eps": 1e-3, "clip": clip, "weight_decay": 0.1},
            }
        )
    )


def train(config: RunConfig, topology: Topology) -> dict[str, Any]:
    """Losses, norms, memory and all exact parameters of a run."""
    phase = plan_phases(config)[-1]
    resolved = resolve_deepspeed_config({}, config, topology.dp_size)
    draw = InitialWeights(ARCHITECTURE, config.train.seed)
    model = build_model(ARCHITECTURE, phase.method, config.train, draw, topology.device)
    engine = TrainEngine(model, phase.method, config, resolved, lambda: None)
    micro, losses, norms, frozen = config.train.micro_batch_size, [], [], 0
    with torch.no_grad():
        phase.method.attach(engine.state, engine.model)
    for step, tokens in enumerate(batches()[:STEPS]):
        factor = phase.method.lr_multiplier(step, phase.schedule)
        engine.set_learning_rates({"dense": factor * 2e-2, "adapter": factor * 3e-2})
        with torch.no_grad():
            phase.method.before_step(engine.state, engine.model, step)
        frozen += sum(int((~clock.live(step)).sum()) for clock in engine.clocks.values())
        mine = tokens.split(micro)[topology.dp_rank :: topology.dp_size]
        loss, norm = engine.train_step(mine)
        with torch.no_grad():
            phase.method.after_step(engine.state, engine.model, step + 1)
        losses.append(float(distributed.mean_over_ranks(loss.clone())))
        norms.append(float(norm))
    engine.check_replicas()  # raises where they differ
    found = {
        "losses": losses,
        "norms": norms,
        "frozen": frozen,
        "parameters": exact_parameters(engine),
        "gradients_left": sum(p.grad is not None for p in engine.model.parameters()),
        "measured": engine.memory.measured and engine.memory.measured.as_dict(),
        "expected": closed_form(
            config,
            ARCHITECTURE,
            phase.method,
            storage_plan(config, 0, topology.dp_size, topology.device),
        ).as_dict(),
    }
    engine.destroy()
    return found


def main(output: Path) -> None:
    topology = distributed.start(5.0)
    figures: dict[str, Any] = {}
    for name in METHODS:
        for precision in ("fp32", "bf16"):
            for micro in (1, 4):  # accumulation 4 and 1
                for clip in (0.0, 0.05) if (name, micro) == ("sltrain", 4) else (0.0,):
                    plain, own = (
                        train(run_config(name, precision, micro, per_layer, clip), topology)
                        for per_layer in (False, True)
                    )
                    gaps = [
                        float((own["parameters"][n] - value).abs().max())
                        for n, value in plain["parameters"].items()
                    ]
                    flat = torch.cat([v.flatten() for v in own.pop("parameters").values()])
                    low, high = flat.clone(), flat.clone()
                    torch.distributed.all_reduce(low, op=torch.distributed.ReduceOp.MIN)
                    torch.distributed.all_reduce(high, op=torch.distributed.ReduceOp.MAX)
                    del plain["parameters"]
                    replicas = float((high - low).max())
                    own |= {"difference": max(gaps), "plain": plain, "replicas": replicas}
                    figures[f"{name}/{precision}/{BATCH // 2 // micro}/{clip:g}"] = own
    if topology.is_main:
        output.write_text(json.dumps(figures))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
