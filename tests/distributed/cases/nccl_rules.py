"""Rank program: runs of every method under NCCL's rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from relora_ds.parallel.topology import Topology, share_models
from tests.harness.build import Training, batches, run_config
from tests.harness.nccl_rules import NcclRefusalError, NcclRules

METHODS: dict[str, dict[str, object]] = {
    "full": {"name": "full"},
    "galore": {"name": "galore", "rank": 4, "update_every": 2},
    "lora": {"name": "lora", "rank": 4},
    "low_rank": {"name": "low_rank", "rank": 4},
    "relora": {"name": "relora", "rank": 4, "merge_every": 2, "restart_warmup_steps": 1},
    "sltrain": {"name": "sltrain", "rank": 4, "sparsity": 0.1},
    "switchlora": {"name": "switchlora", "rank": 4, "interval": 4, "freeze_steps": 1},
}
CUTS: dict[str, tuple[int, int]] = {"zero1": (1, 1), "zero3": (3, 1), "tensor2": (1, 2)}
"""ZeRO stage and tensor-parallel ranks."""
STEPS = 3


def train(world: Topology, method: str) -> dict[str, int]:
    """Collectives of three updates, with a merge or switches, and a check of replicas, per cut."""
    checked = {}
    for cut, (stage, share) in CUTS.items():
        config = run_config(
            METHODS[method], train={"precision": "bf16"}, parallel={"tensor": share}
        )
        topology = share_models(world, config)
        with NcclRules() as rules:
            run = Training(config, topology, {"stage": stage})
            for step, tokens in enumerate(batches(STEPS)):
                run.update(step, tokens, {"dense": 1e-3, "adapter": 1e-3})
            run.check_replicas()
        run.destroy()
        checked[cut] = rules.checked
    return checked


def refusals(world: Topology) -> dict[str, str]:
    """What the rules say of collectives that break one each."""
    gathered = torch.zeros(3)
    kept = torch.zeros(4)
    broken: dict[str, Callable[[], Any]] = {
        "type": lambda: torch.distributed.all_reduce(torch.zeros(2, dtype=torch.int16)),
        "strides": lambda: torch.distributed.broadcast(torch.zeros(2, 3).t(), 0),
        "host": lambda: torch.distributed.all_reduce(kept[1:]),
        "shares": lambda: torch.distributed.all_gather_into_tensor(gathered, torch.zeros(2)),
    }
    said = {}
    with NcclRules() as rules:
        rules.keep_on_host(kept)
        for name, act in broken.items():
            try:
                act()
            except NcclRefusalError as error:
                said[name] = str(error)
        assert rules.checked == 0
    return said
