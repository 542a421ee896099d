"""Sums over the ranks that hold parts of a run's state, with their payload counted."""

from __future__ import annotations

import torch

from relora_ds.engine.zero.layout import Layout
from relora_ds.parallel.tensor import TensorParallel


class StateCollectives:
    """What the ports of `TrainState` move between ranks.

    Args:
        layout: knows the ranks that ZeRO slices the state over.
        tp: the tensor-parallel group, whose ranks hold other parts.
        device: where collectives take their tensors.
    """

    def __init__(self, layout: Layout, tp: TensorParallel, device: torch.device) -> None:
        self._group = layout.partition_group
        self.tp = tp
        self.device = device
        self.bytes_moved = 0
        """Payload so far."""

    def sum_over_slices(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum in place over the ranks that hold different slices; replicated ones count once."""
        if self._group is not None:
            torch.distributed.all_reduce(tensor, group=self._group)
            self.count(tensor)
        return tensor

    def sum_over_shards(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum in place over the tensor-parallel ranks."""
        if self.tp.size > 1:
            self.tp.sum(tensor)
            self.count(tensor)
        return tensor

    def sum_over_state(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum in place over all ranks that hold state; the caller leaves out all copies but one."""
        return self.sum_over_shards(self.sum_over_slices(tensor))

    def count(self, tensor: torch.Tensor) -> None:
        """Take a tensor that was moved into account."""
        self.bytes_moved += tensor.numel() * tensor.element_size()
