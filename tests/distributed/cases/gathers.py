"""Recorded traffic of stage 3 beside the closed form: every method, and options that change it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from relora_ds.accounting.recorder import recorder
from relora_ds.parallel.topology import Topology
from tests.harness.build import UNEVEN
from tests.harness.ranks import ROOT
from tests.harness.traffic import record, uneven

METHODS = ("full", "lora", "relora", "switchlora", "sltrain", "low_rank")
DEEP = {"num_hidden_layers": 2}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "nothing is kept or fetched ahead": (
        {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        },
        {},
        {},
    ),
    "everything is kept": (
        {"stage3_param_persistence_threshold": 10**6, "stage3_max_reuse_distance": 10**9},
        {},
        {},
    ),
    "near uses are kept": ({"stage3_max_reuse_distance": 2000}, {}, DEEP),
    "small limits": (
        {"stage3_max_live_parameters": 1200, "sub_group_size": 300, "reduce_bucket_size": 100},
        {},
        DEEP,
    ),
    "recomputed layers": ({}, {"activation_checkpointing": True}, DEEP),
    "recomputed layers, tied head": (
        {"stage3_prefetch_bucket_size": 0},
        {"activation_checkpointing": True},
        {**DEEP, "tie_word_embeddings": True},
    ),
    "one reduction": ({}, {"gradient_reduction": "step"}, {}),
}
"""Keys of the ZeRO section, of the run's `train` section, and of the architecture."""

Case = tuple[str, str, int]
"""Method, precision, accumulation."""
FEW: list[Case] = [(m, *rest) for m in METHODS for rest in (("fp32", 1), ("bf16", 4))]
REST: list[Case] = [(m, *rest) for m in METHODS for rest in (("fp32", 4), ("bf16", 1))]


def name_of(case: Case) -> str:
    """Its key among the figures."""
    return "/".join(map(str, case))


def shipped() -> dict[str, Any]:
    """The shipped options, at limits that matter in so small a model."""
    zero = json.loads((ROOT / "configs/zero/zero3.json").read_text())["zero_optimization"]
    return zero | {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 1500}


def methods(topology: Topology, cases: Sequence[Case]) -> dict[str, Any]:
    """Traffic of these cases."""
    found = {}
    with recorder:
        for case in cases:
            found[name_of(case)] = record(topology, uneven(*case), shipped())
    return found


def variants(topology: Topology) -> dict[str, Any]:
    """Traffic of ReLoRA with every option."""
    found = {}
    with recorder:
        for name, (keys, train, changes) in VARIANTS.items():
            architecture = UNEVEN.model_copy(update=changes)
            config = uneven("relora", "bf16", 2, **train)
            found[name] = record(topology, config, {**shipped(), **keys}, architecture)
        config = uneven("relora", "bf16", 2)
        found["fp32 gradients"] = record(
            topology, config, shipped(), communication_data_type="fp32"
        )
    return found
