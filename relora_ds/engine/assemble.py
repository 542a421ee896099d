"""From a method and dense weights to a live engine: the one way to build one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine.deepspeed.partition import DenseSlices, build_partitioner
from relora_ds.engine.distributed import barrier
from relora_ds.engine.engine import TrainEngine
from relora_ds.engine.handover import restore_masters
from relora_ds.methods.build import DenseSource, build_model, filled_model, marks
from relora_ds.methods.interface import Method
from relora_ds.model.init import InitialWeights
from relora_ds.model.llama import Llama
from relora_ds.numerics.transfers import upload
from relora_ds.parallel.topology import Topology
from relora_ds.parallel.zero import ZeroSettings


@dataclass(frozen=True)
class AwaitedState:
    """In place of weights: a checkpoint is going to bring all values, none is to be drawn."""


DenseWeights = Mapping[str, torch.Tensor] | DenseSlices | AwaitedState | None
"""Uncut weights by name, this rank's slices of them, a state that is yet to be loaded, or None for
the seed's random draw."""


def build_engine(
    architecture: ModelConfig,
    method: Method[Any],
    config: RunConfig,
    zero: ZeroSettings,
    topology: Topology,
    weights: DenseWeights = None,
    probe_tokens: torch.Tensor | None = None,
    prepare: Callable[[nn.Module], None] | None = None,
) -> TrainEngine:
    """A fresh engine for one phase of a run. A collective call.

    Args:
        architecture: the model.
        method: builds its projections and says what is trained.
        config: the run's settings; nothing of its data is read.
        zero: its ZeRO settings on so many processes.
        topology: this process's place.
        weights: what the model starts from.
        probe_tokens: (B, S) int64; methods report drift with the model's output on them.
        prepare: called with the filled model before it is handed to DeepSpeed.
    """
    slices = weights if isinstance(weights, DenseSlices) else None
    whole = weights if isinstance(weights, Mapping) else None
    tp, device = topology.tp, topology.device
    partitioner = build_partitioner(zero, slices, whole or (), tp)
    what = architecture, method, config.train
    if isinstance(weights, AwaitedState):
        model = filled_model(*what, marks, device, partitioner, tp)
    else:
        source = _dense_source(architecture, config, weights, device)
        std = architecture.initializer_range if weights is None else None
        model = build_model(*what, source, device, partitioner, tp, std)
    if prepare is not None:
        prepare(model)
    exact = None if partitioner is None else partitioner.finish()
    probe = _Probe(model, probe_tokens)
    # reading and drawing weights takes as long as it takes, and DeepSpeed meets on the devices next
    barrier()
    engine = TrainEngine(model, method, config, zero, probe, exact, tp, topology.islands)
    if partitioner is None and whole is not None:
        restore_masters(engine, whole)
    return engine


def _dense_source(
    architecture: ModelConfig,
    config: RunConfig,
    weights: Mapping[str, torch.Tensor] | DenseSlices | None,
    device: torch.device,
) -> DenseSource:
    if isinstance(weights, DenseSlices):
        return weights.rest
    if weights is not None:
        return lambda name, shape: weights[name]
    initial = InitialWeights(architecture, config.train.seed)
    return lambda name, shape: initial(name, shape, device)


class _Probe:
    """Logits of the working model on fixed tokens; None where there are none."""

    def __init__(self, model: Llama, tokens: torch.Tensor | None) -> None:
        self._model, self._tokens = model, tokens

    @torch.no_grad()
    def __call__(self) -> torch.Tensor | None:
        if self._tokens is None:
            return None
        self._model.eval()
        device = self._model.model.embed_tokens.weight.device
        return self._model.logits(upload(self._tokens, device)).float()
