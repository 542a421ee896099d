"""Gradients that tensor parallelism leaves unfinished, and the norm of all of them.

A factor that every tensor-parallel rank holds whole may have seen only this rank's part of the
other factor, a norm or a bias only its part of the sequence. The shares are added up once per
optimizer step, after DeepSpeed has averaged them over the data-parallel ranks and cut them: the two
sums commute, and what is left to move is this rank's slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

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
        layout: where gradients go.
        wrapper: DeepSpeed's optimizer.
        tp: the group that the shares are spread over.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        wrapper: Any,
        tp: TensorParallel,
    ) -> None:
        self._partial = [p for p in partial_gradients(model) if p in layout.placements]
        self._layout, self._wrapper, self._tp = layout, wrapper, tp

    @torch.no_grad()
    def complete(self) -> None:
        """Add the shares up, all of them in one collective; call at an accumulation boundary."""
        if self._tp.size == 1:
            return
        pieces = [piece for parameter in self._partial for piece in self._pieces(parameter)]
        if pieces:
            flat = torch.cat(pieces)
            sums = self._tp.sum(flat).split([piece.numel() for piece in pieces])
            for piece, total in zip(pieces, sums, strict=True):
                piece.copy_(total)
        if self._layout.partition_group is None:
            self._mark()

    def _mark(self) -> None:
        """DeepSpeed's bf16 optimizer of stage 0 asks the gradients, not the parameters, whether
        they are parts, and takes them for copies."""
        for parameter in self._layout.placements:
            if parameter.grad is not None and shard_of(parameter) is not None:
                parameter.grad.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]

    def _pieces(self, parameter: nn.Parameter) -> Iterator[torch.Tensor]:
        """This rank's slice of a reduced gradient, as live 1-D views."""
        if self._layout.partition_group is None:
            assert parameter.grad is not None
            yield parameter.grad.view(-1)
            return
        owner, stretch = (
            self._layout.placements[parameter].owner,
            self._layout.placements[parameter].stretch,
        )
        if owner.grad is not None:  # offloaded
            yield stretch.of(owner.grad.view(-1))
            return
        number = next(n for n, other in enumerate(self._layout.owners()) if other is owner)
        at = 0
        for tensor in self._wrapper.averaged_gradients[number]:
            # the list tiles the owner
            first, last = max(stretch.offset, at), min(stretch.end, at + tensor.numel())
            if first < last:
                yield tensor.view(-1)[first - at : last - at]
            at += tensor.numel()


def global_norm(parameters: Sequence[nn.Parameter], tp: TensorParallel) -> torch.Tensor:
    """Norm of whole gradients, fp32 scalar; what every tensor-parallel rank holds counts once."""
    counted = [
        torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        for parameter in parameters
        if parameter.grad is not None and (shard_of(parameter) is not None or tp.rank == 0)
    ]
    norm = torch.linalg.vector_norm(torch.stack(counted))
    return norm if tp.size == 1 else tp.sum(norm.square()).sqrt()
