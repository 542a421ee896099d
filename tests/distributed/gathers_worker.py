"""Recorded traffic of stage 3 beside the closed form: every method, and options that change it.

Run by `test_gathers.py` on two ranks; rank 0 writes the figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from relora_ds.accounting.recorder import recorder
from relora_ds.engine import distributed
from tests.distributed.communication_worker import record, run_config
from tests.distributed.ranks import ROOT

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
    "near uses are kept": ({"stage3_max_reuse_distance": 2000}, {}, {"architecture": DEEP}),
    "small limits": (
        {"stage3_max_live_parameters": 1200, "sub_group_size": 300, "reduce_bucket_size": 100},
        {},
        {"architecture": DEEP},
    ),
    "recomputed layers": ({}, {"activation_checkpointing": True}, {"architecture": DEEP}),
    "recomputed layers, tied head": (
        {"stage3_prefetch_bucket_size": 0},
        {"activation_checkpointing": True},
        {"architecture": {**DEEP, "tie_word_embeddings": True}},
    ),
    "fp32 gradients": ({}, {}, {"communication_data_type": "fp32"}),
    "one reduction": ({}, {"gradient_reduction": "step"}, {}),
}

Case = tuple[str, str, int]
FEW: list[Case] = [(m, *rest) for m in METHODS for rest in (("fp32", 1), ("bf16", 4))]
REST: list[Case] = [(m, *rest) for m in METHODS for rest in (("fp32", 4), ("bf16", 1))]


def name_of(case: Case) -> str:
    return "/".join(map(str, case))


def figures(cases: Iterable[Case], variants: Iterable[str], output: Path) -> None:
    """Record all of them with the shipped options, at limits that matter in so small a model."""
    shipped = json.loads((ROOT / "configs/zero/zero3.json").read_text())["zero_optimization"]
    shipped |= {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 1500}
    topology = distributed.start(5.0)
    found = {}
    with recorder:
        for case in cases:
            method, precision, accumulation = case
            config = run_config(method, precision, accumulation, 1.0)
            found[name_of(case)] = record(config, shipped, topology)
        for name in variants:
            keys, train, extra = VARIANTS[name]
            config = run_config("relora", "bf16", 2, 1.0, **train)
            found[name] = record(config, {**shipped, **keys}, topology, **extra)
    if topology.is_main:
        output.write_text(json.dumps(found))
    distributed.stop()


if __name__ == "__main__":
    figures(FEW, VARIANTS, Path(sys.argv[1]))
