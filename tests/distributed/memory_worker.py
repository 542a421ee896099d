"""What one update takes up, measured and in closed form, for several methods in one process.

Run by `test_memory.py`; writes figures by case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from relora_ds.config.architecture import read_model_config
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.deepspeed.partition import build_partitioner
from relora_ds.engine.engine import TrainEngine
from relora_ds.methods.build import build_model
from relora_ds.methods.registry import plan_phases
from relora_ds.parallel.topology import Topology
from relora_ds.planning.memory_report import closed_form, storage_plan
from tests.distributed.ranks import ROOT

SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": 8},
    "relora": {"name": "relora", "rank": 8},
    "low_rank": {"name": "low_rank", "rank": 8},
    "sltrain": {"name": "sltrain", "rank": 8},
    "sltrain_step": {"name": "sltrain", "rank": 8, "keep_composed": "step"},
}
PUBLISHED = {
    "60m": {"name": "sltrain", "rank": 128, "alpha": 32, "sparsity": 0.03},
    "130m": {"name": "sltrain", "rank": 256, "alpha": 16, "sparsity": 0.03},
}
SEQUENCE = 32
# one micro-batch per update, so that no gradient is kept
PER_LAYER = {"per_layer_update": True, "global_batch_size": 1}
PER_LAYER_CASES = {
    "masters": ({**PER_LAYER}, "adamw"),
    "bf16": ({**PER_LAYER, "master_weights": False}, "adamw"),
    "bf16_8bit": ({**PER_LAYER, "master_weights": False}, "adamw8bit"),
}


def run_config(
    method: dict[str, Any], precision: str, optimizer: str = "adamw", **train: Any
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": "unused",
            "model": "unused",
            "deepspeed": "unused",
            "method": method,
            "train": {
                "steps": 4,
                "seq_length": SEQUENCE,
                "micro_batch_size": 1,
                "global_batch_size": 2,
                "precision": precision,
                **train,
            },
            "optimizer": {"name": optimizer},
        }
    )


def measure(
    config: RunConfig, architecture: ModelConfig, stage: int, topology: Topology
) -> dict[str, Any]:
    """Both figures after one update."""
    phase = plan_phases(config)[-1]
    resolved = resolve_deepspeed_config({"zero_optimization": {"stage": stage}}, config, 1)
    generator = torch.Generator().manual_seed(0)

    def source(_: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape).uniform_(-0.02, 0.02, generator=generator)

    partitioner = build_partitioner(resolved)
    device = topology.device
    model = build_model(architecture, phase.method, config.train, source, device, partitioner)
    exact = None if partitioner is None else partitioner.finish()
    engine = TrainEngine(model, phase.method, config, resolved, lambda: None, exact)
    engine.set_learning_rates({"dense": 1e-3, "adapter": 1e-3})
    tokens = torch.randint(0, architecture.vocab_size, (2, 1, SEQUENCE + 1), generator=generator)
    micro_batches = tokens.unbind(0)[: config.train.global_batch_size]
    engine.train_step(micro_batches)
    plan = storage_plan(config, stage, 1, topology.device)
    expected = closed_form(config, architecture, phase.method, plan)
    measured = engine.memory.measured
    engine.train_step(micro_batches)
    assert measured is engine.memory.measured, "only the first update is measured"
    engine.destroy()
    assert measured is not None
    return {"measured": measured.as_dict(), "expected": expected.as_dict()}


def main(output: Path) -> None:
    topology = distributed.start(5.0)
    figures = {}
    for stage in (0, 1, 2, 3):
        for name, method in METHODS.items():
            for precision in ("fp32", "bf16"):
                config = run_config(method, precision)
                figures[f"{name}/{precision}/{stage}"] = measure(config, SMALL, stage, topology)
    for name in ("full", "sltrain"):
        config = run_config(METHODS[name], "bf16", activation_checkpointing=True)
        figures[f"{name}/checkpointed"] = measure(config, SMALL, 0, topology)
    for size, method in PUBLISHED.items():
        architecture = read_model_config(ROOT / f"configs/model/llama_{size}.json")
        figures[size] = measure(run_config(method, "bf16"), architecture, 0, topology)
        for kind, (train, optimizer) in PER_LAYER_CASES.items():
            config = run_config(method, "bf16", optimizer, **train)
            figures[f"{size}/{kind}"] = measure(config, architecture, 0, topology)
    output.write_text(json.dumps(figures))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
