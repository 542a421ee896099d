"""The same updates with gradients where the product keeps them and where DeepSpeed does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from relora_ds.engine.deepspeed import backend
from relora_ds.parallel.topology import Topology, share_models
from tests.harness.build import CUT, UNEVEN, Training, batches, run_config

STEPS = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "one bucket": {},
    "many buckets": {"reduce_bucket_size": 300},
    "to owners": {"use_multi_rank_bucket_allreduce": False, "reduce_bucket_size": 300},
    "all-reduce": {"reduce_scatter": False},
}
"""Of DeepSpeed's section: what decides how gradients are reduced."""


def updates(
    topology: Topology, cells: list[tuple[int, str, str]], tensor: int = 1
) -> dict[str, list[list[tuple[float, float]]]]:
    """Loss and gradient norm of each update, flat and by DeepSpeed alone.

    Args:
        topology: this rank's place.
        cells: stage of ZeRO, precision and name of the options.
        tensor: ranks that share a copy of the model.
    """
    found = {}
    for stage, precision, options in cells:
        flat = list(_updates(topology, stage, precision, options, tensor))
        with patch.object(backend, "use_flat_gradients", lambda wrapper: None):
            plain = list(_updates(topology, stage, precision, options, tensor))
        found[f"{stage}/{precision}/{options}"] = [flat, plain]
    return found


def _updates(
    topology: Topology, stage: int, precision: str, options: str, tensor: int
) -> Iterator[tuple[float, float]]:
    config = run_config(
        {"name": "relora", "rank": 2, "merge_every": 100, "restart_warmup_steps": 1},
        train={"precision": precision},
        optimizer={"eps": 1e-3, "clip": 0.0},
        parallel={"tensor": tensor},
    )
    architecture = UNEVEN if tensor == 1 else CUT
    shared = share_models(topology, config)
    run = Training(config, shared, {"stage": stage, **OPTIONS[options]}, architecture)
    for step, tokens in enumerate(batches(STEPS)):
        update = run.update(step, tokens, {"dense": 4e-3, "adapter": 6e-3})
        yield update.loss, update.norm
    run.check_replicas()
    run.destroy()
