"""Gradients that tensor parallelism leaves unfinished, and the norm of all of them.

A factor that every tensor-parallel rank holds whole may have seen only this rank's part of the
other factor, a norm or a bias only its part of the sequence. The shares are added up once per
optimizer step, after DeepSpeed has averaged them over the data-parallel ranks and cut them: the two
sums commute, and what is left to move is this rank's slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from relora_ds.engine.zero.layout import Layout
from relora_ds.model.llama import partial_gradients
from relora_ds.parallel.shape import shard_of
from relora_ds.parallel.tensor import TensorParallel


class TensorGradients:
    """What is left to do with the gradients between the last backward pass and the update.

    Args:
        model: says which of its trained parameters have gradients that are shares of a sum.
        layout: where this rank's slices of gradients are.
        tp: the group that the shares are spread over.
    """

    def __init__(self, model: nn.Module, layout: Layout, tp: TensorParallel) -> None:
        self._partial = [p for p in partial_gradients(model) if p in layout.placements]
        self._layout, self._tp = layout, tp

    @torch.no_grad()
    def complete(self) -> None:
        """Add the shares up, all of them in one collective; call at an accumulation boundary."""
        if self._tp.size == 1:
            return
        pieces = [piece for p in self._partial for piece in self._layout.gradient(p)]
        if pieces:
            # offloaded slices are on the host, where no collective of the devices reaches them
            flat = torch.cat(pieces).to(self._partial[0].device)
            sums = self._tp.sum(flat).split([piece.numel() for piece in pieces])
            for piece, total in zip(pieces, sums, strict=True):
                piece.copy_(total)


def global_norm(parameters: Sequence[nn.Parameter], tp: TensorParallel) -> torch.Tensor:
    """Norm of whole gradients, fp32 scalar; what every tensor-parallel rank holds counts once."""
    counted = [
        torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        for parameter in parameters
        if parameter.grad is not None and (shard_of(parameter) is not None or tp.rank == 0)
    ]
    norm = torch.linalg.vector_norm(torch.stack(counted))
    return norm if tp.size == 1 else tp.sum(norm.square()).sqrt()
