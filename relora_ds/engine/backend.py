"""Starting what drives a model: DeepSpeed's engine, or what stands in for it."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn

from relora_ds.config.schema import RunConfig
from relora_ds.engine.deepspeed.config import reduces_once
from relora_ds.engine.deepspeed.partition import name_hpz_group
from relora_ds.engine.per_layer import PerLayerEngine
from relora_ds.parallel.tensor import ModelParallelUnit, TensorParallel


def start_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    deepspeed_config: dict[str, Any],
    tp: TensorParallel,
) -> Any:
    """DeepSpeed's engine, or what stands in for it."""
    if config.train.per_layer_update:
        device = next(model.parameters()).device
        masters = config.train.master_weights
        return PerLayerEngine(model, optimizer, deepspeed_config, device, masters)
    engine = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config,
        dist_init_required=False,
        mpu=None if tp.size == 1 else ModelParallelUnit(),
    )[0]
    name_hpz_group()
    if reduces_once(config, deepspeed_config):
        # DeepSpeed steps once per update; the loss is still divided by the number of micro-batches
        engine.set_gradient_accumulation_boundary(True)
    return engine
