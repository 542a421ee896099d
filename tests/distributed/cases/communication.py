"""Recorded traffic of training steps at stages 0 to 2, beside closed form and profiler."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch.distributed import ProcessGroup, distributed_c10d

from relora_ds.accounting.collectives import CALLS
from relora_ds.accounting.recorder import recorder
from relora_ds.engine import distributed
from relora_ds.parallel.topology import Topology
from tests.harness.build import UNEVEN, VOCAB, Training, changed
from tests.harness.traffic import MICRO, SEQUENCE, listed, record, uneven

STAGES, PRECISIONS, METHODS, ACCUMULATIONS = (0, 1, 2), ("fp32", "bf16"), ("full", "relora"), (1, 2)
# keys of the ZeRO file that change what is moved, and the rest of the case
VARIANTS: dict[str, tuple[dict[str, Any], int, str, float]] = {
    "no clipping, fp32, stage 0": ({}, 0, "fp32", 0.0),
    "no clipping, bf16, stage 1": ({}, 1, "bf16", 0.0),
    "to owners": ({"use_multi_rank_bucket_allreduce": False}, 2, "fp32", 1.0),
    "to owners, stage 1": ({"use_multi_rank_bucket_allreduce": False}, 1, "fp32", 1.0),
    "no reduce-scatter": (
        {"reduce_scatter": False, "use_multi_rank_bucket_allreduce": False}, 2, "fp32", 1.0
    ),
    "small buckets": ({"reduce_bucket_size": 100}, 2, "bf16", 1.0),
}  # fmt: skip


def steps(topology: Topology) -> dict[str, Any]:
    """Every method, stage, precision and accumulation, and options that change what is moved."""
    found: dict[str, Any] = {}
    with recorder:
        for method in METHODS:
            for stage in STAGES:
                for precision in PRECISIONS:
                    for accumulation in ACCUMULATIONS:
                        config = uneven(method, precision, accumulation)
                        case = f"{method}/{stage}/{precision}/{accumulation}"
                        found[case] = record(topology, config, {"stage": stage})
        for name, (keys, stage, precision, clip) in VARIANTS.items():
            config = uneven("relora", precision, 2, clip)
            found[name] = record(topology, config, {"stage": stage, **keys})
        found["fp32 gradients"] = record(
            topology, uneven("relora", "bf16", 2), {"stage": 2}, communication_data_type="fp32"
        )
        found["bf16 gradients"] = record(
            topology, uneven("relora", "fp32", 2), {"stage": 1}, communication_data_type="bf16"
        )
        config = uneven("relora", "bf16", 4, gradient_reduction="step")
        found["one reduction"] = record(topology, config, {"stage": 2})
    return found


def reductions(topology: Topology) -> dict[str, list[list[float]]]:
    """Losses and norms of runs that reduce once per micro-batch or once per update."""
    return {
        f"{stage}/{precision}/{reduction}": trained(topology, stage, precision, reduction)
        for stage in (1, 2, 3)
        for precision in PRECISIONS
        for reduction in ("micro_batch", "step")
    }


def trained(topology: Topology, stage: int, precision: str, reduction: str) -> list[list[float]]:
    """Losses and gradient norms of four updates of three micro-batches that differ by rank."""
    # the same arithmetic at every stage: by itself stage 3 would not keep composed weights
    config = changed(
        uneven("relora", precision, 3, 0.5, gradient_reduction=reduction),
        "train",
        formulation="step",
    )
    run = Training(config, topology, {"stage": stage}, UNEVEN)
    generator = torch.Generator().manual_seed(topology.rank)
    found = []
    for _ in range(4):
        run.engine.set_learning_rates({"dense": 1e-2, "adapter": 1e-2})
        tokens = torch.randint(0, VOCAB, (3, MICRO, SEQUENCE + 1), generator=generator)
        loss, norm = run.train_step(tokens.unbind(0))
        found.append([float(distributed.mean_over_ranks(loss)), float(norm)])
    assert run.engine.completed_steps() == 4
    run.destroy()
    return found


def hooks(topology: Topology) -> dict[str, Any]:
    """What the recorder counts on each way to a collective, and what it leaves behind."""
    originals = {name: vars(ProcessGroup).get(name) for name in CALLS}
    early = recorder.volumes()
    with recorder:
        counted = aliases()
    restored = all(vars(ProcessGroup).get(n) is f for n, f in originals.items())
    before = recorder.volumes()
    distributed.barrier()
    silent = not early and recorder.volumes() == before
    return {"aliases": counted, "restored": restored, "silent_when_off": silent}


def aliases() -> dict[str, Any]:
    """One collective on each way to it; each must be counted once."""
    recorder.begin_step()
    value, parts = torch.ones(3), [torch.zeros(3), torch.zeros(3)]
    deepspeed.comm.all_reduce(value)
    torch.distributed.all_reduce(tensor=value)
    torch.distributed.distributed_c10d.all_reduce(value)
    torch.distributed.all_gather(tensor_list=parts, tensor=value)
    # a function object that the backend looked up before the recorder was started
    deepspeed.comm.comm.cdb.all_gather_into_tensor(output_tensor=torch.zeros(6), input_tensor=value)
    deepspeed.comm.comm.cdb.reduce_scatter_tensor(torch.zeros(3), torch.zeros(6))
    torch.distributed.all_to_all(parts, [torch.zeros(3), torch.zeros(3)])
    distributed.barrier()
    return listed({k: (v.calls, v.payload) for k, v in recorder.step_volumes().items()})


def group_timeouts(topology: Topology) -> list[float]:
    """Seconds after which each process group gives up, those of two engines among them."""
    for stage in (1, 3):
        Training(uneven("relora", "fp32", 1), topology, {"stage": stage}, UNEVEN).destroy()
    groups = distributed_c10d._world.pg_map
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return [backend.options._timeout.total_seconds() for backend in backends]
