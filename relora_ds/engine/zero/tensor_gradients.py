"""Gradients that DeepSpeed leaves unfinished or never sees, and the norm of all of them.

A factor that every tensor-parallel rank holds whole may have seen only this rank's part of the
other factor, a norm or a bias only its part of the sequence. The shares are added up once per
optimizer step, after DeepSpeed has averaged them over the data-parallel ranks and cut them: the two
sums commute, and what is left to move is this rank's slice. The gradient of a frozen weight, which
DeepSpeed never sees, is formed between updates and reduced to one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.distributed import ProcessGroup

from relora_ds.engine.zero.layout import Layout
from relora_ds.methods.dense_gradients import Gradients
from relora_ds.model.embedding import TokenEmbedding
from relora_ds.model.llama import partial_gradients
from relora_ds.numerics.transfers import upload
from relora_ds.parallel.islands import ALONE, Islands
from relora_ds.parallel.shape import TPShard, shard_of
from relora_ds.parallel.tensor import TensorParallel
from relora_ds.parallel.wholes import Wholes


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
        self._layout.await_gradients()
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
    layout.await_gradients()
    for parameter in layout.placements:
        once = first and (shard_of(parameter) is not None or tp.rank == 0)
        for piece in layout.gradient(parameter):
            square = torch.linalg.vector_norm(piece, dtype=torch.float32).double() ** 2
            sums.append(torch.stack([square * once, square]))
    if not sums:
        return torch.zeros(2, dtype=torch.float64, device=device)
    return torch.stack(sums).sum(0).to(device)


class FrozenGradients(Gradients):
    """Whole gradients of frozen weights on ranks that take turns.

    Args:
        model: as DeepSpeed left it.
        device: where it computes.
        group: the data-parallel ranks; None for a single process.
        tp: the group that shares a copy of the model.
        islands: whose mean a gradient is.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        group: ProcessGroup | None,
        tp: TensorParallel,
        islands: Islands = ALONE,
    ) -> None:
        self._model, self._device, self._group, self._tp = model, device, group, tp
        self._islands = islands
        self._copies = 1 if group is None else torch.distributed.get_world_size(group)
        self._copy = 0 if group is None else torch.distributed.get_rank(group)
        self.batch: Callable[[], Iterable[torch.Tensor]] = tuple
        self.count: Callable[[torch.Tensor], None] = lambda tensor: None
        """Called with every tensor that is moved."""

    @property
    def owners(self) -> int:
        return self._copies * self._tp.size

    def passes(self) -> Iterator[int]:
        # the only leaf whose gradient is asked for: no hook of a parameter runs, which would have
        # DeepSpeed reduce and keep its gradient
        gate = torch.ones((), device=self._device, requires_grad=True)

        def pass_gate(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            return output * gate.to(output.dtype)

        embedding = next(m for m in self._model.modules() if isinstance(m, TokenEmbedding))
        handle = embedding.register_forward_hook(pass_gate)
        self._model.train()
        micro_batches = list(self.batch())
        try:
            for left, tokens in zip(
                reversed(range(len(micro_batches))), micro_batches, strict=True
            ):
                yield left
                with torch.enable_grad():
                    loss = self._model(upload(tokens, self._device))
                    torch.autograd.grad(loss, gate)
        finally:
            handle.remove()

    def mean(self, weight: nn.Parameter, part: torch.Tensor, turn: int) -> torch.Tensor | None:
        part.div_(self._copies)
        if self._copies > 1:
            owner = turn % self._copies
            torch.distributed.reduce(part, group=self._group, group_dst=owner)
            self.count(part)
            if self._copy != owner:
                return None
        self._islands.mean(part)
        shard = shard_of(weight)
        if shard is None:
            return part if self._tp.rank == self._tensor_owner(turn) else None
        return self._joined(part, shard, self._tensor_owner(turn))

    def _tensor_owner(self, turn: int) -> int:
        return turn // self._copies % self._tp.size

    def _joined(self, part: torch.Tensor, shard: TPShard, owner: int) -> torch.Tensor | None:
        """The whole of which the tensor-parallel ranks have parts, on one of them."""
        whole, tp = shard.global_shape, self._tp
        assert tp.group is not None
        spans = [replace(tp, rank=rank).span(whole[shard.dim]) for rank in range(tp.size)]
        across = whole.numel() // whole[shard.dim]
        sizes = [(stop - start) * across for start, stop in spans]
        # cut along the first dimension, parts lie one behind the other
        flat = part.transpose(0, shard.dim).reshape(-1)
        self.count(flat)
        found = Wholes(tp.group, {"": (sizes, owner)}).gather({"": flat})
        if tp.rank != owner:
            return None
        rows = found[""].view(whole[shard.dim], across)
        return rows if shard.dim == 0 else rows.t()

    def spread(self, value: torch.Tensor, turn: int) -> torch.Tensor:
        copy = turn % self._copies
        if self._tp.size > 1 and self._copy == copy:
            source = self._tensor_owner(turn)
            torch.distributed.broadcast(value, group=self._tp.group, group_src=source)
            self.count(value)
        if self._copies > 1:
            torch.distributed.broadcast(value, group=self._group, group_src=copy)
            self.count(value)
        return value
