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


@torch.no_grad()
def square_sums_of_slices(layout: Layout, tp: TensorParallel, device: torch.device) -> torch.Tensor:
    """Squared norms of the gradients that this rank holds slices of, before an update.

    Args:
        layout: where the slices are.
        tp: the group that shares this copy of the model.
        device: where the sums are wanted.

    Returns:
        (2,), fp64: a share, of which those of all ranks add up to the square of the global norm;
        and the sum over all slices, those that other ranks hold as well included.
    """
    cut = layout.partition_group is not None
    first = cut or torch.distributed.get_rank() // tp.size == 0
    sums = []
    for parameter in layout.placements:
        once = first and (shard_of(parameter) is not None or tp.rank == 0)
        for piece in layout.gradient(parameter):
            square = torch.linalg.vector_norm(piece, dtype=torch.float32).to(device).double() ** 2
            sums.append(torch.stack([square * once, square]))
    return torch.stack(sums).sum(0) if sums else torch.zeros(2, dtype=torch.float64, device=device)
