"""What one update takes up, measured and in closed form."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch

from relora_ds.config.architecture import read_model_config
from relora_ds.config.model import ModelConfig
from relora_ds.engine import engine
from relora_ds.engine.backend import Backend, start_backend
from relora_ds.parallel.topology import Topology
from tests.harness.build import STAGES, Training, run_config
from tests.harness.ranks import ROOT

SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
ODD = SMALL.model_copy(update={"intermediate_size": 33})
"""An MLP that takes 40 columns where rows are to be aligned."""
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": 8},
    "relora": {"name": "relora", "rank": 8},
    "low_rank": {"name": "low_rank", "rank": 8},
    "galore": {"name": "galore", "rank": 8},
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


def measure(
    topology: Topology,
    architecture: ModelConfig,
    method: Mapping[str, object],
    train: Mapping[str, object],
    optimizer: str = "adamw",
    stage: int = 0,
) -> dict[str, Any]:
    """Bytes by component after one update, `measured` and `expected`."""
    shape = {"steps": 4, "seq_length": SEQUENCE, "micro_batch_size": 1, "global_batch_size": 2}
    config = run_config(method, train=shape | dict(train), optimizer={"name": optimizer})
    generator = torch.Generator().manual_seed(0)
    run = Training(config, topology, {"stage": stage}, architecture)
    run.engine.set_learning_rates({"dense": 1e-3, "adapter": 1e-3})
    tokens = torch.randint(0, architecture.vocab_size, (2, 1, SEQUENCE + 1), generator=generator)
    micro_batches = tokens.unbind(0)[: config.train.global_batch_size]
    run.train_step(micro_batches)
    measured, expected = run.measured_memory, run.expected_memory()
    run.train_step(micro_batches)
    assert run.measured_memory == measured, "only the first update is measured"
    run.destroy()
    return {"measured": measured, "expected": expected}


def small(topology: Topology) -> dict[str, Any]:
    """Every method in both precisions at every stage, and recomputed layers."""
    found = {}
    for stage in STAGES:
        for name, method in METHODS.items():
            for precision in ("fp32", "bf16"):
                train = {"precision": precision}
                case = f"{name}/{precision}/{stage}"
                found[case] = measure(topology, SMALL, method, train, stage=stage)
    for name in ("full", "sltrain"):
        train = {"precision": "bf16", "activation_checkpointing": True}
        found[f"{name}/checkpointed"] = measure(topology, SMALL, METHODS[name], train)
    for name in ("full", "relora", "sltrain_step"):
        train = {"precision": "bf16", "pad_mlp": "on"}
        found[f"{name}/padded"] = measure(topology, ODD, METHODS[name], train)
    return found


def published(topology: Topology) -> dict[str, Any]:
    """Models of the papers, with ordinary updates and with updates within the backward pass."""
    found = {}
    for size, method in PUBLISHED.items():
        architecture = read_model_config(ROOT / f"configs/model/llama_{size}.json")
        found[size] = measure(topology, architecture, method, {"precision": "bf16"})
        for kind, (train, optimizer) in PER_LAYER_CASES.items():
            train = {"precision": "bf16", **train}
            found[f"{size}/{kind}"] = measure(topology, architecture, method, train, optimizer)
    return found


def handed_over(topology: Topology) -> dict[str, dict[str, int]]:
    """Bytes of tensors when DeepSpeed gets a bf16 model whose frozen weights are edited.

    Returns:
        By kind of base weight: `live`, what building the model left; `model`, its fp32 size;
        `edited`, elements of edited weights.
    """
    found: dict[str, dict[str, int]] = {}
    for kind in ("bf16_residual", "bf16", "fp32"):
        train = {"precision": "bf16", "base_precision": kind}
        config = run_config({"name": "relora", "rank": 2, "warm_start_steps": 0}, train=train)
        before = _live_bytes()
        look = partial(_start, found.setdefault(kind, {}))
        with mock.patch.object(engine, "start_backend", look):
            Training(config, topology, {"stage": 1}, SMALL).destroy()
        found[kind]["live"] -= before
    return found


def _start(figures: dict[str, int], model: torch.nn.Module, *rest: Any) -> Backend:
    """Start the backend, and note what there was before."""
    parameters = list(model.parameters())
    figures["live"] = _live_bytes()
    figures["model"] = sum(4 * p.numel() for p in parameters)
    figures["edited"] = sum(p.numel() for p in parameters if p.dtype == torch.bfloat16)
    return start_backend(model, *rest)


def _live_bytes() -> int:
    """Of all tensors that Python knows, each storage once."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
