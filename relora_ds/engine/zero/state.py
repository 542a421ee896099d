"""`TrainState` on top of a layout: what methods may do to a partitioned run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from relora_ds.accounting.recorder import recorder
from relora_ds.engine.zero.collectives import StateCollectives
from relora_ds.engine.zero.host_memory import ZeroHostMemory
from relora_ds.engine.zero.moments import OptimizerSlices, ZeroMoments
from relora_ds.engine.zero.tensor_gradients import FrozenGradients
from relora_ds.engine.zero.vectors import ZeroVectors
from relora_ds.engine.zero.weights import Beside, ZeroWeights
from relora_ds.methods.train_state import TrainState
from relora_ds.numerics.base_weight import BaseWeight
from relora_ds.parallel.tensor import SINGLE, TensorParallel

Probe = Callable[[], torch.Tensor | None]


class ZeroState(TrainState):
    """Weights, masters and moments, whole or sliced, wherever the layout says they are.

    Args:
        slices: what the optimizer keeps on this rank; its layout knows working weights and masters.
        bases: authoritative store of every frozen weight that may be edited.
        probe: output of the model on a fixed batch.
        gradients: runs the model outside of updates.
        edited: called with every frozen parameter that was edited.
        tp: the tensor-parallel group whose ranks hold other parts.
        beside: what else is known of the elements of a tensor that the optimizer steps: tensors
            (N,) on the host, of its size. Whatever a method sets anew, or lets begin anew, leaves
            nothing there.
    """

    def __init__(
        self,
        slices: OptimizerSlices,
        bases: Mapping[nn.Parameter, BaseWeight],
        probe: Probe,
        gradients: FrozenGradients,
        edited: Callable[[nn.Parameter], None] = lambda weight: None,
        tp: TensorParallel = SINGLE,
        beside: Beside = lambda owner: (),
    ) -> None:
        layout = slices.layout
        # collectives are where the parameters are, also if moments are offloaded
        device = next(iter((*layout.placements, *bases))).device
        self._collectives = collectives = StateCollectives(layout, tp, device)
        self._probe = probe
        gradients.count = collectives.count
        host = ZeroHostMemory(layout, collectives)
        super().__init__(
            ZeroWeights(layout, bases, edited, collectives, beside),
            ZeroMoments(slices, collectives),
            ZeroVectors(slices, host, collectives, beside),
            host,
            gradients,
        )

    @property
    def bytes_moved(self) -> int:
        return self._collectives.bytes_moved

    def probe(self) -> torch.Tensor | None:
        with recorder.phase("eval"):
            return self._probe()
