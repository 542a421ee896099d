"""hpZ on two "nodes" of two ranks: losses, bytes by group, and copies that follow every edit.

Run by `test_hpz.py` on four ranks; rank 0 writes the figures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import torch

from relora_ds.accounting.recorder import recorder
from relora_ds.accounting.zero_traffic import expected_payloads
from relora_ds.engine import distributed
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.deepspeed.partition import build_partitioner
from relora_ds.engine.engine import TrainEngine
from relora_ds.methods.build import build_model, meta_model
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.parallel.shape import tp_local_shape
from relora_ds.parallel.topology import Topology
from tests.distributed.communication_worker import ARCHITECTURE, VOCAB, run_config

STEPS, NODE = 6, 2
CASES = (("relora", "fp32"), ("relora", "bf16"), ("switchlora", "fp32"))
ZERO = {
    "stage": 3,
    "stage3_param_persistence_threshold": 100,
    "stage3_prefetch_bucket_size": 600,
    "stage3_max_reuse_distance": 0,
}


def train(method: str, precision: str, node: int, topology: Topology) -> dict[str, Any]:
    # the helper's global batch is for two ranks
    config = run_config(method, precision, 2 * topology.dp_size // 2, 1.0)
    phase = plan_phases(config)[-1]
    zero = {**ZERO, "zero_hpz_partition_size": node}
    resolved = resolve_deepspeed_config({"zero_optimization": zero}, config, topology.dp_size)
    partitioner = build_partitioner(resolved)
    assert partitioner is not None
    draw = InitialWeights(ARCHITECTURE, config.train.seed)
    model = build_model(
        ARCHITECTURE, phase.method, config.train, draw, topology.device, partitioner
    )
    engine = TrainEngine(model, phase.method, config, resolved, lambda: None, partitioner.finish())
    phase.method.attach(engine.state, engine.model)
    meta = meta_model(ARCHITECTURE, phase.method, config.train)
    groups = [group.parameters for group in phase.method.parameter_groups(meta)]
    expected = expected_payloads(meta, groups, resolved, topology.dp_size)
    generator = torch.Generator().manual_seed(topology.rank)
    found: dict[str, Any] = {"losses": [], "bytes": []}
    for step in range(STEPS):
        engine.set_learning_rates({"dense": 1e-2, "adapter": 1e-2})
        tokens = torch.randint(0, VOCAB, (2, 2, 9), generator=generator)
        with torch.no_grad():
            phase.method.before_step(engine.state, engine.model, step)
        recorder.begin_step()
        loss, _ = engine.train_step(tokens.unbind(0))
        moved = {kind: volume.payload for kind, volume in recorder.step_volumes().items()}
        found["bytes"].append(moved == expected)
        found["losses"].append(float(distributed.mean_over_ranks(loss)))
        with torch.no_grad():
            phase.method.after_step(engine.state, engine.model, step + 1)
    found["copies"], found["stale"] = copies(engine, node)
    found["far"] = sum(s for k, s in expected.items() if k.operation == "all_gather" and k.size > 2)
    found["near"] = sum(s for k, s in expected.items() if k.group == "hpz")
    engine.check_replicas()
    engine.destroy()
    return found


def copies(engine: TrainEngine, node: int) -> tuple[int, int]:
    """How many second copies this rank has, and how many differ from the weights."""
    count = stale = 0
    for parameter in engine.model.parameters():
        second = cast(Any, parameter).ds_secondary_tensor
        cast(Any, parameter).partition()
        cast(Any, parameter).ds_secondary_tensor = second
        (whole,) = engine.layout.gather([parameter])
        if second is not None:
            count += 1
            start = second.numel() * (torch.distributed.get_rank() % node)
            mine = whole.reshape(-1)[start : start + second.numel()]
            length = min(tp_local_shape(parameter).numel() - start, second.numel())
            stale += not torch.equal(second[:length], mine)
    return count, stale


def main(output: Path) -> None:
    topology = distributed.start(5.0)
    figures = {}
    with recorder:
        for method, precision in CASES:
            for node in (1, NODE):
                figures[f"{method}/{precision}/{node}"] = train(method, precision, node, topology)
    if topology.is_main:
        output.write_text(json.dumps(figures))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
