"""Losses of one long ReLoRA run at every ZeRO stage, on as many ranks as there are."""

from __future__ import annotations

from typing import Any

from relora_ds.config.schema import RunConfig
from relora_ds.parallel.topology import Topology
from tests.harness.build import MICRO, STAGES, batches, changed
from tests.harness.runs import RATES, STEPS, relora, start

LONG, MERGE_EVERY = 64, 16


def long_run(mode: str, precision: str = "fp32", micro: int = MICRO) -> RunConfig:
    """64 steps with three merges."""
    config = relora(mode, precision, merge_every=MERGE_EVERY)
    return changed(config, "train", steps=LONG, micro_batch_size=micro)


def losses(topology: Topology, config: RunConfig, stage: int) -> dict[str, Any]:
    """Loss of every step, and the events."""
    run = start(config, stage, topology)
    found: dict[str, Any] = {"losses": [], "events": []}
    tokens = batches(STEPS)
    for step in range(LONG):
        update = run.update(step, tokens[step % STEPS], RATES)
        found["losses"].append(update.loss)
        if update.event is not None:
            found["events"].append({"step": step + 1, **vars(update.event)})
    run.check_replicas()
    run.destroy()
    return found


def figures(topology: Topology, modes: tuple[str, ...], stages: tuple[int, ...]) -> dict[str, Any]:
    """Runs of every one of these reset modes at every one of these stages."""
    return {
        f"{mode}/{stage}": losses(topology, long_run(mode), stage)
        for mode in modes
        for stage in stages
    }


def bf16_losses(topology: Topology) -> list[list[float]]:
    """Losses of a run in bf16 by stage.

    It has no accumulation, because stage 2 rounds its sum once per micro-batch, and no clipping,
    because every stage adds the gradient norm up in another order.
    """
    config = changed(long_run("zero", "bf16", micro=4), "optimizer", clip=0.0)
    return [losses(topology, config, stage)["losses"] for stage in STAGES]
