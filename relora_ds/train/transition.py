"""Handing the model from one phase to the next within a process."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch

from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import TrainConfig
from relora_ds.engine.deepspeed_engine import TrainEngine
from relora_ds.engine.partition import DenseSlices
from relora_ds.methods.interface import Method
from relora_ds.train.build import dense_weights

_logger = logging.getLogger(__name__)


def take_dense_weights(
    engine: TrainEngine, architecture: ModelConfig, method: Method[Any], train: TrainConfig
) -> dict[str, torch.Tensor] | DenseSlices:
    """The dense model at full precision, and the engine freed. A collective call.

    Where the weights are cut over ranks, the slices are handed over as they are: nothing is
    gathered, so the old phase's parameters must be the dense model's.

    The new phase builds new modules: hooks of the old engine stay on the old ones, and two engines
    never exist at once.
    """
    weights = engine.exact_slices()
    if weights is None:
        weights = dict(dense_weights(architecture, method, train, engine.exact_parameters()))
    old_model = weakref.ref(engine.model)
    engine.destroy()
    if old_model() is not None:
        _logger.warning("the warm start's engine was not freed: its memory stays in use")
    return weights
