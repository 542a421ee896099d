"""The checks of the port on `ZeroState` of every layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from relora_ds.engine import distributed
from relora_ds.parallel.topology import Topology
from tests.contract.ports import (
    CHECKS,
    Subject,
    a_reset_forgets_and_freezes,
    an_exchange_is_absorbed,
    vectors_are_rows,
)
from tests.harness.build import STAGES, Training, batches, changed
from tests.harness.runs import SMALL_BUCKETS, SWITCH_RATES, switchlora

Keys = Mapping[str, object]


@dataclass(frozen=True)
class LayoutCase:
    """What makes the product choose a layout: keys of the ZeRO section, of the rest of DeepSpeed's
    dictionary, and of the run's `train` section."""

    stage: int
    precision: str
    zero: Keys = field(default_factory=dict)
    deepspeed: Keys = field(default_factory=dict)
    train: Keys = field(default_factory=dict)


LAYOUTS = {
    **{f"stage {s}, {p}": LayoutCase(s, p) for s in STAGES for p in ("fp32", "bf16")},
    "stage 3, nothing persists": LayoutCase(
        3, "bf16", zero={"stage3_param_persistence_threshold": 0}
    ),
    "stage 1, sums in fp32": LayoutCase(
        1, "bf16", deepspeed={"data_types": {"grad_accum_dtype": "fp32"}}
    ),
    "per layer": LayoutCase(0, "bf16", train={"per_layer_update": True}),
    "per layer, no masters": LayoutCase(
        0, "bf16", train={"per_layer_update": True, "master_weights": False}
    ),
}


def check(
    topology: Topology, layout: str, checks: Sequence[Callable[[Subject], None]] = CHECKS
) -> None:
    """Every check on a state of its own after one update."""
    case = LAYOUTS[layout]
    config = changed(switchlora(case.precision), "train", **case.train)
    for each in checks:
        zero = {"stage": case.stage, **SMALL_BUCKETS, **case.zero}
        run = Training(config, topology, zero, deepspeed=case.deepspeed)
        run.update(0, batches(1)[0], SWITCH_RATES)
        layer = run.layers[4]
        shape = run.engine.state.weights.shape
        parameters = layer.weight, layer.lora_A, layer.lora_B
        shapes = shape(layer.weight), shape(layer.lora_A), shape(layer.lora_B)
        with torch.no_grad():
            each(Subject(run.engine.state, *parameters, distributed.sum_over_ranks, shapes))
        run.destroy()


def check_kernels(topology: Topology, layout: str) -> None:
    """What kernels in Triton compute of the port, under Triton's interpreter."""
    os.environ["RELORA_DS_TRITON"] = "cpu"  # of this rank, which ends with the case
    checks = vectors_are_rows, a_reset_forgets_and_freezes, an_exchange_is_absorbed
    check(topology, layout, checks)
