"""What drives a model: DeepSpeed's engine, or what stands in for it where it cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed import ProcessGroup

from relora_ds.config.schema import RunConfig
from relora_ds.engine.deepspeed.backend import DeepSpeedBackend
from relora_ds.engine.deepspeed.process_group import accelerator_type
from relora_ds.engine.per_layer import PerLayerEngine
from relora_ds.engine.zero.layout import Layout
from relora_ds.parallel.tensor import TensorParallel
from relora_ds.parallel.zero import ZeroSettings

_logger = logging.getLogger(__name__)


class Backend(Protocol):
    """Passes, reduction of gradients, updates and files of a model, by DeepSpeed's names."""

    module: nn.Module
    """The model in its working precision."""
    device: torch.device
    """Where the process computes."""
    data_parallel_group: ProcessGroup
    """Processes that hold the same part of other copies of the model."""
    reports_norm: bool
    """Whether `get_global_grad_norm` knows the norm."""

    def layout(self, groups: Sequence[Sequence[nn.Parameter]]) -> Layout:
        """Where masters and moments of the optimizer's groups are.

        Raises:
            ConfigError: nothing is known of how they are kept.
            ReloraError: a master does not hold the value of its parameter.
        """
        ...

    def watch_updates(self, look: Callable[[], None]) -> None:
        """Call `look` when an update begins, while its gradients are alive."""
        ...

    def train(self) -> None:
        """Put the model into training mode."""
        ...

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The model's loss, a scalar, on a micro-batch of tokens (B, S + 1)."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's share to the gradients; reduce them where that is done here."""
        ...

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last one of an update."""
        ...

    def coalesce_grad_reduction(self) -> AbstractContextManager[Any]:
        """Gradients of the backward passes inside are reduced on the way out."""
        ...

    def step(self) -> None:
        """Close a micro-batch; at the boundary the update is done when this returns."""
        ...

    def get_global_grad_norm(self) -> torch.Tensor | float:
        """Norm of all gradients of the last update before clipping, where `reports_norm`."""
        ...

    def shards(self) -> dict[str, Any]:
        """What this rank writes of model and optimizer, by name of the file; tensors are live. A
        collective call."""
        ...

    def load_checkpoint(self, directory: str, tag: str) -> None:
        """Restore what was written of `shards`, into the same layout. A collective call.

        Raises:
            CheckpointError: it was written by another backend.
        """
        ...

    def destroy(self) -> None:
        """Let go of the model, so that another phase can have it."""
        ...


def start_backend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    zero: ZeroSettings,
    tp: TensorParallel,
) -> Backend:
    """What drives the model of a run.

    Args:
        model: filled, in fp32; it is cast and moved, or was by a `ZeroPartitioner`.
        optimizer: over the model's parameters.
        config: the run.
        zero: its ZeRO settings.
        tp: the group that shares this copy of the model.
    """
    if config.train.per_layer_update:
        device = next(model.parameters()).device
        return PerLayerEngine(model, optimizer, zero, device, config.train.master_weights)
    if zero.stage == 0 and _waits_per_parameter(config):
        _logger.warning(
            "zero_optimization.stage is 0 with train.precision bf16 on a GPU: DeepSpeed's wrapper "
            "for it waits for the device once per parameter in every update; take stage 1, which "
            "computes the same and is faster on one GPU too"
        )
    return DeepSpeedBackend(model, optimizer, zero, tp)


def _waits_per_parameter(config: RunConfig) -> bool:
    """Whether the device is one that can be waited for, and stage 0 has fp32 masters of bf16."""
    train = config.train
    return train.precision == "bf16" and train.master_weights and accelerator_type() == "cuda"
