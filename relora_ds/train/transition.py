"""Handing the model from one phase to the next within a process."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.engine.deepspeed.partition import DenseSlices
from relora_ds.engine.engine import TrainEngine
from relora_ds.engine.handover import exact_parameters, exact_slices
from relora_ds.methods.build import dense_weights
from relora_ds.methods.interface import Method
from relora_ds.parallel.shape import TPShard, shard_of
from relora_ds.parallel.tensor import TensorParallel

_logger = logging.getLogger(__name__)


class JoinedWeights(Mapping[str, torch.Tensor]):
    """Uncut weights, each put together from the ranks of a tensor-parallel group when it is read.

    Reading one is a collective call of the group, and no rank ever holds the whole model.

    Args:
        parts: this rank's parts, fp32 on the CPU.
        shards: which parts of the whole they are, where they are not the whole.
        tp: the group.
        device: where its collectives take their tensors.
    """

    def __init__(
        self,
        parts: dict[str, torch.Tensor],
        shards: Mapping[str, TPShard],
        tp: TensorParallel,
        device: torch.device,
    ) -> None:
        self._parts, self._shards, self._tp, self._device = parts, shards, tp, device

    def __getitem__(self, name: str) -> torch.Tensor:
        part = self._parts[name]
        if name not in self._shards:
            return part
        shard = self._shards[name]
        whole = torch.zeros(shard.global_shape, device=self._device)
        shard.place(part, whole)
        return self._tp.sum(whole).cpu()  # every element is on one rank: exact

    def __contains__(self, name: object) -> bool:
        return name in self._parts  # the inherited one would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def take_dense_weights(
    engine: TrainEngine,
    architecture: ModelConfig,
    method: Method[Any],
    train: TrainConfig,
    tp: TensorParallel,
) -> Mapping[str, torch.Tensor] | DenseSlices:
    """The dense model at full precision, and the engine freed. A collective call.

    Where ZeRO cuts the weights, the slices are handed over as they are, and where tensor
    parallelism does, the parts: the old phase's parameters must then be the dense model's.

    The new phase builds new modules: hooks of the old engine stay on the old ones, and two engines
    never exist at once.
    """
    weights = exact_slices(engine)
    if weights is None and tp.size > 1:
        found = {n: shard_of(p) for n, p in engine.model.named_parameters()}
        shards = {name: shard for name, shard in found.items() if shard is not None}
        weights = JoinedWeights(exact_parameters(engine), shards, tp, engine.device)
    elif weights is None:
        weights = dict(dense_weights(architecture, method, train, exact_parameters(engine)))
    old_model = weakref.ref(engine.model)
    engine.destroy()
    if old_model() is not None:
        _logger.warning("the warm start's engine was not freed: its memory stays in use")
    return weights
