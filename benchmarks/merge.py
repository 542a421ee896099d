"""Time one stage-3 merge on slices against gathering whole weights. See --help.

Prints one JSON line with seconds, bytes and their ratios.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import deepspeed
import torch
from torch import nn

from relora_ds.accounting.recorder import recorder
from relora_ds.cli.parser import run_tool, tool_parser
from relora_ds.engine import distributed
from relora_ds.engine.deepspeed.layouts import PartitionedParameters
from relora_ds.engine.deepspeed.partition import ZeroPartitioner
from relora_ds.engine.zero.moments import OptimizerSlices
from relora_ds.engine.zero.state import ZeroState
from relora_ds.engine.zero.tensor_gradients import FrozenGradients
from relora_ds.numerics.base_weight import KINDS
from relora_ds.parallel.tensor import SINGLE
from relora_ds.parallel.zero import ZeroSettings

_EXAMPLE = """
example:
  torchrun --nproc_per_node 2 benchmarks/merge.py --layers 4 --width 1536 --rank 8
"""
_SCALE = 1e-3
_CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
_ZERO = ZeroSettings(stage=3, deepspeed=_CONFIG)


def main() -> None:
    parser = tool_parser(__doc__, _EXAMPLE)
    parser.add_argument("--layers", type=int, default=4, help="matrices to merge")
    parser.add_argument("--width", type=int, default=1536, help="columns; rows are 8/3 of them")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--repeats", type=int, default=5, help="the fastest of so many counts")
    parsed = parser.parse_args()
    figures = benchmark_merge(parsed.layers, parsed.width, parsed.rank, parsed.repeats)
    if figures is not None:
        print(json.dumps(figures))


def benchmark_merge(layers: int, width: int, rank: int, repeats: int) -> dict[str, Any] | None:
    """Merge `layers` fp32 matrices (8/3 width, width) both ways, best of `repeats`.

    Returns:
        Seconds and payload bytes of both and their ratios; None on other ranks than 0.
    """
    topology = distributed.start(10.0)
    triples = [_triple(width * 8 // 3, width, rank, topology.device) for _ in range(layers)]
    group = torch.distributed.group.WORLD
    assert group is not None
    # the layout of an engine that trains nothing: only its slices are used
    no_wrapper = cast(Any, None)
    layout = PartitionedParameters([], torch.optim.SGD([torch.zeros(1)]), group, no_wrapper)
    bases = {}
    for weight, _, _ in triples:
        _, working = layout.working(weight)
        bases[weight] = KINDS["working"](working, working.clone())
    gradients = FrozenGradients(torch.nn.Module(), topology.device, group, SINGLE)
    state = ZeroState(OptimizerSlices(layout, {}, lambda: 0), bases, lambda: None, gradients)

    def on_slices() -> None:
        factors = state.weights.gather_in_turn([(lora_b, lora_a) for _, lora_a, lora_b in triples])
        edits = [
            state.weights.add_product(weight, left, right, _SCALE)
            for (weight, _, _), (left, right) in zip(triples, factors, strict=True)
        ]
        state.weights.totals([edit for edit in edits if edit is not None])

    def gathered() -> None:
        for triple in triples:
            weight, lora_a, lora_b = triple
            with deepspeed.zero.GatheredParameters(list(triple), modifier_rank=0):
                if topology.rank == 0:
                    weight.data.add_(lora_b.data @ lora_a.data, alpha=_SCALE)

    with torch.no_grad():
        slices_s, slices_bytes = _measure(on_slices, repeats)
        gathered_s, gathered_bytes = _measure(gathered, repeats)
    distributed.stop()
    if topology.rank != 0:
        return None
    return {
        "slices_seconds": slices_s,
        "gathered_seconds": gathered_s,
        "seconds_ratio": slices_s / gathered_s,
        "slices_bytes": slices_bytes,
        "gathered_bytes": gathered_bytes,
        "bytes_ratio": slices_bytes / gathered_bytes,
    }


def _triple(
    rows: int, cols: int, rank: int, device: torch.device
) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """W, A and B, cut."""
    shapes = {"weight": (rows, cols), "lora_A": (rank, cols), "lora_B": (rows, rank)}
    partitioner = ZeroPartitioner(_ZERO)
    made = []
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(len(name))
        parameter = nn.Parameter(torch.randn(shape, generator=generator).to(device))
        partitioner(name, parameter)
        made.append(parameter)
    return made[0], made[1], made[2]


def _measure(merge: Callable[[], None], repeats: int) -> tuple[float, int]:
    """Least seconds of a merge, and the payload of one."""
    merge()
    recorder.reset()
    with recorder:
        merge()
    moved = sum(volume.payload for volume in recorder.volumes().values())
    best = float("inf")
    for _ in range(repeats):
        distributed.barrier()
        started = time.perf_counter()
        merge()
        distributed.barrier()
        best = min(best, time.perf_counter() - started)
    return best, moved


if __name__ == "__main__":
    sys.exit(run_tool(main))
