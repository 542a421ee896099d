"""hpZ on "nodes" of two ranks: losses, bytes by group, and copies that follow every edit."""

from __future__ import annotations

from typing import Any, cast

import torch

from relora_ds.accounting.recorder import recorder
from relora_ds.engine import distributed
from relora_ds.parallel.shape import tp_local_shape
from relora_ds.parallel.topology import Topology
from tests.harness.build import UNEVEN, VOCAB, Training
from tests.harness.traffic import MICRO, SEQUENCE, expectation, uneven

STEPS, NODE = 6, 2
CASES = (("relora", "fp32"), ("relora", "bf16"), ("switchlora", "fp32"))
ZERO = {
    "stage": 3,
    "stage3_param_persistence_threshold": 100,
    "stage3_prefetch_bucket_size": 600,
    "stage3_max_reuse_distance": 0,
}


def train(topology: Topology, method: str, precision: str, node: int) -> dict[str, Any]:
    """Six updates with copies of the weights on every node of this many ranks."""
    config = uneven(method, precision, 2, copies=topology.dp_size)
    run = Training(config, topology, {**ZERO, "zero_hpz_partition_size": node}, UNEVEN)
    _, expected = expectation(run)
    generator = torch.Generator().manual_seed(topology.rank)
    found: dict[str, Any] = {"losses": [], "bytes": []}
    for step in range(STEPS):
        run.engine.set_learning_rates({"dense": 1e-2, "adapter": 1e-2})
        tokens = torch.randint(0, VOCAB, (2, MICRO, SEQUENCE + 1), generator=generator)
        run.before_step(step)
        recorder.begin_step()
        loss, _ = run.train_step(tokens.unbind(0))
        moved = {kind: volume.payload for kind, volume in recorder.step_volumes().items()}
        found["bytes"].append(moved == expected)
        found["losses"].append(float(distributed.mean_over_ranks(loss)))
        run.after_step(step + 1)
    found["copies"], found["stale"] = copies(run, node)
    found["far"] = sum(s for k, s in expected.items() if k.operation == "all_gather" and k.size > 2)
    found["near"] = sum(s for k, s in expected.items() if k.group == "hpz")
    run.check_replicas()
    run.destroy()
    return found


def copies(run: Training, node: int) -> tuple[int, int]:
    """How many second copies this rank has, and how many differ from the weights."""
    count = stale = 0
    for parameter in run.named.values():
        held = cast(Any, parameter)  # DeepSpeed adds to it
        second = held.ds_secondary_tensor
        held.partition()
        held.ds_secondary_tensor = second
        (whole,) = run.engine.layout.gather([parameter])
        if second is not None:
            count += 1
            start = second.numel() * (run.topology.rank % node)
            mine = whole.reshape(-1)[start : start + second.numel()]
            length = min(tp_local_shape(parameter).numel() - start, second.numel())
            stale += not torch.equal(second[:length], mine)
    return count, stale


def figures(topology: Topology) -> dict[str, Any]:
    """Every case without and with second copies."""
    found = {}
    with recorder:
        for method, precision in CASES:
            for node in (1, NODE):
                found[f"{method}/{precision}/{node}"] = train(topology, method, precision, node)
    return found
