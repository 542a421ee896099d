"""What a run takes up, measured and in closed form, side by side."""

from __future__ import annotations

from typing import Any

import torch

from relora_ds.accounting.memory.model import StoragePlan, expected_memory
from relora_ds.accounting.memory.use import MemoryUse
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.engine.precision import base_precision
from relora_ds.methods.build import meta_model, shard_over_ranks
from relora_ds.methods.formulation.choice import update_of
from relora_ds.methods.interface import Method, matrix_rules, optimizer_groups, projection_layers
from relora_ds.model.llama import Llama
from relora_ds.numerics.codes.block_codes import BLOCK
from relora_ds.numerics.dtypes import DTYPES
from relora_ds.parallel.tensor import TensorParallel
from relora_ds.parallel.topology import part_of_model

_FP32 = 4
_BESIDE = {"working": 0, "bf16_residual": 2, "fp32": 4}


def storage_plan(
    config: RunConfig,
    stage: int,
    dp_size: int,
    device: torch.device,
    memory: int | None = None,
) -> StoragePlan:
    """How the run stores its numbers under DeepSpeed.

    Args:
        config: the run.
        stage: of ZeRO.
        dp_size: data-parallel processes.
        device: that computes.
        memory: bytes of it; None where there is no telling.
    """
    train, bf16 = config.train, config.train.precision == "bf16"
    return StoragePlan(
        working=DTYPES[train.precision].itemsize,
        # from stage 1 on DeepSpeed updates flat copies, also of fp32 weights
        master=_FP32 if (bf16 and train.master_weights) or stage >= 1 else 0,
        moment=1 + _FP32 / BLOCK if config.optimizer.name == "adamw8bit" else _FP32,
        beside_edited=_BESIDE[base_precision(config)],
        stage=stage,
        dp_size=dp_size,
        tensor=config.parallel.tensor,
        sequence=config.parallel.sequence,
        per_layer=train.per_layer_update,
        accumulates=train.global_batch_size > train.micro_batch_size * dp_size,
        host=device.type == "cpu",
        memory=memory,
    )


def largest_part(
    architecture: ModelConfig, method: Method[Any], train: TrainConfig, tp: TensorParallel
) -> Llama:
    """Without memory, what the first tensor-parallel rank holds: no other one holds more.

    What is cut by the values of a draw is taken for cut evenly.
    """
    model = meta_model(architecture, method, train, tp)
    if tp.size > 1:
        for module in model.modules():
            shard_over_ranks(module)
    return model


def closed_form(
    config: RunConfig, architecture: ModelConfig, method: Method[Any], plan: StoragePlan
) -> MemoryUse:
    """Expected bytes per process by component; nothing is allocated."""
    part = largest_part(architecture, method, config.train, part_of_model(config.parallel))
    return memory_of_part(part, method, config, plan)


def memory_of_part(
    part: Llama, method: Method[Any], config: RunConfig, plan: StoragePlan
) -> MemoryUse:
    """Expected bytes per process of a part of the model that `largest_part` returned."""
    groups, train = optimizer_groups(method, config.optimizer, part), config.train
    return expected_memory(
        part,
        plan,
        [group.parameters for group in groups],
        method.edited_weights(part),
        update_of(
            projection_layers(part).values(),
            train,
            plan.stage,
            plan.dp_size,
            "cpu" if plan.host else "cuda",
            plan.memory,
        ),
        train.activation_checkpointing,
        matrix_rules(method, config.optimizer, part),
    )


def saved_bytes(use: MemoryUse, plan: StoragePlan, apart: int = 0) -> int:
    """About how many bytes a checkpoint of all processes takes.

    Args:
        use: expected of each process.
        plan: how it stores them: what all copies of the model have alike is saved once.
        apart: further islands with states of their own.
    """
    weights = plan.dp_size if plan.stage == 3 else 1
    states = plan.dp_size if plan.stage > 0 else 1
    return plan.tensor * (weights * use.weights + (1 + apart) * states * use.states)


def memory_metrics(measured: MemoryUse | None, expected: MemoryUse) -> dict[str, int]:
    """Measured and expected bytes by metric, such as `memory/measured/states_bytes`.

    Empty if no step was measured.
    """
    if measured is None:
        return {}
    named = {"measured": measured, "expected": expected}
    return {
        f"memory/{kind}/{component}_bytes": count
        for kind, found in named.items()
        for component, count in found.as_dict().items()
    }
