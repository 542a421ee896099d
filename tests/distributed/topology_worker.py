"""Losses of one ReLoRA run at every ZeRO stage, on as many ranks as it is started with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.parallel.topology import Topology
from tests.distributed import relora_worker as base

STEPS, MERGE_EVERY = 64, 16
MODES = ("zero", "random", "magnitude")
STAGES = {1: (0, 3), 2: (0, 1, 2, 3), 4: (0, 3)}


def long_run(mode: str, precision: str = "fp32", micro: int = base.MICRO) -> RunConfig:
    config = base.run_config(0, base.RESETS[mode], precision)
    train = config.train.model_copy(update={"steps": STEPS, "micro_batch_size": micro})
    method = config.method.model_copy(update={"merge_every": MERGE_EVERY})
    return config.model_copy(update={"train": train, "method": method})


def losses(stage: int, config: RunConfig, topology: Topology, **zero: Any) -> dict[str, Any]:
    """Loss of every step, averaged over ranks, and the events."""
    phase, engine = base.build(stage, config, topology, **zero)
    found: dict[str, Any] = {"losses": [], "events": []}
    micro = config.train.micro_batch_size
    for step in range(config.train.steps):
        factor = phase.method.lr_multiplier(step, phase.schedule)
        engine.set_learning_rates({"dense": factor * 2e-2, "adapter": factor * 3e-2})
        tokens = base.batches()[step % base.STEPS]
        starts = range(topology.dp_rank * micro, base.BATCH, micro * topology.dp_size)
        loss, _ = engine.train_step([tokens[at : at + micro] for at in starts])
        with torch.no_grad():
            event = phase.method.after_step(engine.state, engine.model, step + 1)
        found["losses"].append(float(distributed.mean_over_ranks(loss)))
        if event is not None:
            found["events"].append({"step": step + 1, **vars(event)})
    engine.check_replicas()
    engine.destroy()
    return found


def main(output: Path) -> None:
    topology = distributed.start(5.0)
    # four ranks share few cores: one mode there
    modes = MODES if topology.dp_size < 4 else MODES[:1]
    figures = {
        f"{mode}/{stage}": losses(stage, long_run(mode), topology)
        for mode in modes
        for stage in STAGES[topology.dp_size]
    }
    if topology.dp_size == 2:
        # Without accumulation, because stage 2 rounds its sum once per micro-batch, and without
        # clipping, because every stage adds the gradient norm up in another order.
        config = long_run("zero", "bf16", micro=4)
        unclipped = config.optimizer.model_copy(update={"clip": 0.0})
        config = config.model_copy(update={"optimizer": unclipped})
        for stage in (0, 1, 2, 3):
            figures[f"bf16/{stage}"] = losses(stage, config, topology)
    if topology.is_main:
        output.write_text(json.dumps(figures))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
