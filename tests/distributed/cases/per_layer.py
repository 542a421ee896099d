"""Updates within the backward pass, beside ordinary ones at stage 0."""

from __future__ import annotations

from typing import Any

from relora_ds.parallel.topology import Topology
from tests.harness.build import BATCH, Training, spread
from tests.harness.runs import EVENTFUL, RATES, eventful, train_eventful


def figures(topology: Topology) -> dict[str, Any]:
    """Every method in both precisions, with and without accumulation; clipped once."""
    found: dict[str, Any] = {}
    for name in EVENTFUL:
        for precision in ("fp32", "bf16"):
            for micro in (1, 4):  # accumulation 4 and 1
                for clip in (0.0, 0.05) if (name, micro) == ("sltrain", 4) else (0.0,):
                    case = f"{name}/{precision}/{BATCH // 2 // micro}/{clip:g}"
                    found[case] = compare(topology, name, precision, micro, clip)
    return found


def pairs(topology: Topology) -> dict[str, Any]:
    """Methods with events whose pairs of factors are updated as one, in both precisions."""
    return {
        f"{name}/{precision}": compare(topology, name, precision, 4, 0.0, adapter="spectral")
        for name in ("relora", "switchlora")
        for precision in ("fp32", "bf16")
    }


def compare(
    topology: Topology, name: str, precision: str, micro: int, clip: float, **optimizer: object
) -> dict[str, Any]:
    """What the run found; beside it `plain`, what the run with ordinary updates found."""
    both, parameters = [], []
    for per_layer in (False, True):
        config = eventful(
            name,
            {"precision": precision, "micro_batch_size": micro, "per_layer_update": per_layer},
            {"lr": 2e-2, "eps": 1e-3, "clip": clip, **optimizer},
        )
        run = Training(config, topology, {"stage": 0})
        both.append(train_eventful(run, RATES))
        parameters.append(run.exact())
        run.destroy()
    plain, own = both
    gaps = [float((parameters[1][n] - value).abs().max()) for n, value in parameters[0].items()]
    replicas = spread(parameters[1].values())
    return own | {"difference": max(gaps), "plain": plain, "replicas": replicas}
