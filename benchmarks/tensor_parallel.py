"""Time steps of one global batch, cut over the model against cut over data. See --help.

Prints one JSON line with seconds, bytes and their ratios; the run's data is not read.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from relora_ds.accounting.recorder import recorder
from relora_ds.cli.parser import add_run, run_tool, tool_parser
from relora_ds.config.load import load_run_config
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.assemble import build_engine
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.methods.registry import plan_phases
from relora_ds.parallel.topology import Topology, share_models

_EXAMPLE = """
example:
  torchrun --nproc_per_node 2 benchmarks/tensor_parallel.py configs/run/llama_60m_relora.yaml \\
      train.precision=fp32 train.global_batch_size=8
"""


def main() -> None:
    parser = tool_parser(__doc__, _EXAMPLE)
    add_run(parser)
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage of both ways")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind")
    parsed = parser.parse_intermixed_args()
    loaded = load_run_config(parsed.run, parsed.overrides)
    figures = benchmark_tensor(loaded.config, loaded.architecture, parsed.stage, parsed.repeats)
    if figures is not None:
        print(json.dumps(figures))


def benchmark_tensor(
    config: RunConfig, architecture: ModelConfig, stage: int, repeats: int
) -> dict[str, Any] | None:
    """Time steps of one global batch, cut over data and over the model, in turns.

    Args:
        config: the run; every process takes part once as a copy of the model and once as a part.
        stage: ZeRO stage of both.
        repeats: steps of each kind.

    Returns:
        Median seconds, processor seconds of rank 0, payload bytes and ratios; None on other ranks
        than 0. Other jobs on the machine weigh less on the processor's time than on the clock.
    """
    world = distributed.start(config.train.timeout_minutes)
    size, batch = world.world_size, config.train.global_batch_size
    # copies first: building the other engine tells DeepSpeed of the tensor-parallel groups
    ways = {
        name: _Stepper(_cut(config, tensor, batch * tensor // size), architecture, stage, world)
        for name, tensor in (("data", 1), ("tensor", size))
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}
    moved = {name: stepper.bytes_of_a_step() for name, stepper in ways.items()}
    for _ in range(repeats):
        for name, stepper in ways.items():
            distributed.barrier()
            started = time.perf_counter(), time.process_time()
            stepper.step()
            busy[name].append(time.process_time() - started[1])
            distributed.barrier()
            seconds[name].append(time.perf_counter() - started[0])
    distributed.stop()
    if not world.is_main:
        return None
    return {
        "data_seconds": statistics.median(seconds["data"]),
        "tensor_seconds": statistics.median(seconds["tensor"]),
        "seconds_ratio": _ratio(seconds),
        "processor_ratio": _ratio(busy),
        "data_bytes": moved["data"],
        "tensor_bytes": moved["tensor"],
    }


def _ratio(found: Mapping[str, Sequence[float]]) -> float:
    """Median over pairs of neighbouring steps."""
    return statistics.median(t / d for t, d in zip(found["tensor"], found["data"], strict=True))


def _cut(config: RunConfig, tensor: int, micro: int) -> RunConfig:
    """The run with its global batch in one micro-batch per copy of the model."""
    train = config.train.model_copy(update={"micro_batch_size": micro})
    parallel = config.parallel.model_copy(update={"tensor": tensor})
    return config.model_copy(update={"train": train, "parallel": parallel})


class _Stepper:
    """An engine and a batch for it."""

    def __init__(
        self, config: RunConfig, architecture: ModelConfig, stage: int, world: Topology
    ) -> None:
        topology = share_models(world, config)
        method, train = plan_phases(config)[-1].method, config.train
        source = {"zero_optimization": {"stage": stage}}
        zero = resolve_deepspeed_config(source, config, topology.dp_size)
        self._engine = build_engine(architecture, method, config, zero, topology)
        self._engine.set_learning_rates(dict.fromkeys(("dense", "adapter", "pair"), 1e-3))
        generator = torch.Generator().manual_seed(topology.dp_rank)
        shape = (train.micro_batch_size, train.seq_length + 1)
        self._tokens = torch.randint(0, architecture.vocab_size, shape, generator=generator)

    def step(self) -> None:
        """One update; waits for it."""
        loss, _ = self._engine.train_step([self._tokens])
        loss.item()

    def bytes_of_a_step(self) -> int:
        """Payload of the collectives of one update, after another one."""
        self.step()
        with recorder:
            recorder.begin_step()
            self.step()
            return recorder.step_bytes().payload


if __name__ == "__main__":
    sys.exit(run_tool(main))
