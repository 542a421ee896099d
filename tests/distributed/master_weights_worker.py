"""bf16 weights that are their own masters, against masters, on one or two ranks of one batch.

Run by `test_master_weights.py`; rank 0 writes the figures.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.parallel.topology import Topology
from tests.distributed import per_layer_worker, switchlora_worker
from tests.distributed.relora_worker import BATCH

CASES = {
    "full": ("full", "adamw"),
    "relora": ("relora", "adamw8bit"),
    "sltrain": ("sltrain", "adamw8bit"),
    "switchlora": ("switchlora", "adamw"),
    "switchlora_8bit": ("switchlora", "adamw8bit"),
}


def without_masters(config: RunConfig, **more: Any) -> RunConfig:
    train = {"per_layer_update": True, "master_weights": False, **more}
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def case(name: str, micro: int, clip: float = 0.05) -> tuple[RunConfig, RunConfig]:
    """The run with masters and without them."""
    method, optimizer_name = CASES[name]
    config = per_layer_worker.run_config(method, "bf16", micro, True, clip)
    optimizer = config.optimizer.model_copy(update={"name": optimizer_name})
    config = config.model_copy(update={"optimizer": optimizer})
    return config, without_masters(config)


def compare(name: str, micro: int, topology: Topology) -> dict[str, Any]:
    """Both runs; of the one without masters also the bits of all weights in the end."""
    plain, own = (per_layer_worker.train(config, topology) for config in case(name, micro))
    parameters = own.pop("parameters")
    exact = plain.pop("parameters")
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
        "edited": 14 if CASES[name][0] in ("relora", "switchlora") else 0,  # exact beyond bf16
        "parameters": len(parameters),
    }


def main(output: Path) -> None:
    topology = distributed.start(5.0)
    figures: dict[str, Any] = {}
    for name in CASES:
        # half of the batch at a time: two micro-batches of one process, or one of each of two
        figures[name] = compare(name, BATCH // 2, topology)
    figures["accumulated"] = compare("sltrain", 1, topology)
    config = without_masters(switchlora_worker.run_config(0, "bf16"))
    figures["resume"] = switchlora_worker.resumed(0, config, topology, output.parent / "resume")
    if topology.is_main:
        output.write_text(json.dumps(figures))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
