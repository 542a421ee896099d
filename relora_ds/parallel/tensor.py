"""Tensor parallelism: a process's place in its group, and the collectives that join the parts.

Activations between blocks are the same on every rank of the group. A block (attention, MLP, head)
passes its input through `enter`, works on the rank's part of the weights, and sums what the ranks
found with `leave`: one all-reduce forward and one backward per block, whatever its projections are
made of. With sequence parallelism each rank holds a part of the sequence between blocks; a block is
entered with an all-gather and left with a reduce-scatter, which move as much.

A tensor on the meta device has no values, so none are exchanged: the structure of a part can be
walked through without its group.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch.distributed import ProcessGroup

LowRankPlan = Literal["auto", "act", "fold"]
TensorFunction = Callable[[torch.Tensor], torch.Tensor]

# torch 2.13 renamed them and warns of the old names
_all_gather: Any = getattr(torch.distributed, "all_gather_single", None) or (
    torch.distributed.all_gather_into_tensor
)
_reduce_scatter: Any = getattr(torch.distributed, "reduce_scatter_single", None) or (
    torch.distributed.reduce_scatter_tensor
)


@dataclass(frozen=True)
class TensorParallel:
    """This process's part of one copy of the model.

    Args:
        rank: within the group.
        size: processes that share one copy.
        group: their process group; may be None for a group of one.
        data_group: processes that hold the same part of other copies, of one island; None for all
            processes.
        plan: what becomes of the factor of a low-rank product that the cut of the weight leaves
            alone. `act`: it is cut along the rank dimension, and the ranks exchange (tokens, r)
            activations in every pass. `fold`: it is whole on every rank, and its gradient is summed
            once per optimizer step. `auto`: `act` where the size divides r.
        sequence: whether activations (B, S, D) between blocks are cut along S, which the size
            divides.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None
    plan: LowRankPlan = "auto"
    sequence: bool = False

    @property
    def suffix(self) -> str:
        """What tells this rank's files from those of the others; empty for a group of one."""
        return "" if self.size == 1 else f"_tp_{self.rank}"

    def shards_inner(self, r: int) -> bool:
        """Whether factors of this low rank are sharded along it.

        `act` moves 2 (N - 1) / N r elements per token, `fold` next to nothing; but `fold` keeps the
        states of whole factors on every rank, and computes products with them N times.
        """
        return self.size > 1 and self.plan != "fold" and r % self.size == 0

    def span(self, length: int) -> tuple[int, int]:
        """Elements [start, stop) of a dimension that belong to this rank.

        Parts differ by one element at most, so nothing has to be padded and no size is refused.
        """
        share, rest = divmod(length, self.size)
        start = self.rank * share + min(self.rank, rest)
        return start, start + share + (self.rank < rest)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """A block's whole input (B, S, D); gradients of it are summed over the group."""
        if self.size == 1:
            return x
        if self.sequence:
            return _along_sequence(x, self.join, self.divide)
        if x.is_meta:
            return x
        from megatron.core.tensor_parallel import mappings

        copied = mappings.copy_to_tensor_model_parallel_region(x, group=self.group)
        return cast(torch.Tensor, _OwnGradient.apply(copied))

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the group of a block's output (B, S, D), or this rank's part of that sum.
        May overwrite `x`."""
        if self.size == 1:
            return x
        if self.sequence:
            return _along_sequence(x, self.divide, self.join)
        if x.is_meta:
            return x
        from megatron.core.tensor_parallel import mappings

        # megatron-core 0.16.1 leaves a tensor that is not contiguous unreduced, without a word
        return mappings.reduce_from_tensor_model_parallel_region(x.contiguous(), group=self.group)

    def join(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        """The ranks' equal parts along a dimension put together, outside of autograd.

        megatron-core's own forms of this and of `divide` need a GPU.
        """
        if self.size == 1:
            return part
        mine = part.movedim(dim, 0).contiguous()
        whole = mine.new_empty(self.size * mine.shape[0], *mine.shape[1:])
        if not part.is_meta:
            _all_gather(whole, mine, group=self.group)
        return whole.movedim(0, dim)

    def divide(self, share: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part along a dimension of the sum of all shares: the transpose of `join`."""
        if self.size == 1:
            return share
        whole = share.movedim(dim, 0).contiguous()
        mine = whole.new_empty(whole.shape[0] // self.size, *whole.shape[1:])
        if not share.is_meta:
            _reduce_scatter(mine, whole, group=self.group)
        return mine.movedim(0, dim)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the group in place, outside of autograd; `x` is contiguous."""
        return self._reduce(x, torch.distributed.ReduceOp.SUM)

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """Maximum over the group in place, outside of autograd; `x` is contiguous."""
        return self._reduce(x, torch.distributed.ReduceOp.MAX)

    def _reduce(self, x: torch.Tensor, op: Any) -> torch.Tensor:
        if self.size > 1 and not x.is_meta:
            assert x.is_contiguous()
            torch.distributed.all_reduce(x, op=op, group=self.group)
        return x


SINGLE = TensorParallel()
"""No tensor parallelism."""


class _Exchanged(torch.autograd.Function):
    """One exchange on the way forward, its transpose on the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, there: TensorFunction, back: TensorFunction
    ) -> torch.Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.back(grads[0]), None, None


def exchange(x: torch.Tensor, there: TensorFunction, back: TensorFunction) -> torch.Tensor:
    """`there(x)`, of which the gradient is `back` of the result's."""
    return cast(torch.Tensor, _Exchanged.apply(x, there, back))


def _along_sequence(
    x: torch.Tensor, there: Callable[..., torch.Tensor], back: Callable[..., torch.Tensor]
) -> torch.Tensor:
    return exchange(x, partial(there, dim=-2), partial(back, dim=-2))


class _OwnGradient(torch.autograd.Function):
    """Hands a contiguous gradient of its own to the reduction behind it.

    megatron-core 0.16.1 sums a contiguous gradient in place, where autograd may still need it for
    another branch, and leaves any other one unsummed.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0].clone(memory_format=torch.contiguous_format)


def join_tensor_group(
    size: int, plan: LowRankPlan, sequence: bool, timeout_minutes: float
) -> TensorParallel:
    """Build Megatron's groups and take this process's place. A collective call.

    Ranks of one copy of the model are neighbours, so that they share a node where they can.
    """
    if size == 1:
        return SINGLE
    with warnings.catch_warnings():
        # Transformer Engine and Apex are optional, and nothing of them is used here
        warnings.simplefilter("ignore", UserWarning)
        from megatron.core import parallel_state, tensor_parallel  # noqa: F401

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=size,
            distributed_timeout_minutes=max(1, round(timeout_minutes)),
            create_gloo_process_groups=False,
        )
    group = cast(ProcessGroup, parallel_state.get_tensor_model_parallel_group())
    data_group = cast(ProcessGroup, parallel_state.get_data_parallel_group())
    return TensorParallel(group.rank(), size, group, data_group, plan, sequence)


class ModelParallelUnit:
    """What DeepSpeed asks Megatron for: the groups of its world, by their names of old.

    Args:
        tp: this process's part of one copy of the model; it has both groups.
    """

    def __init__(self, tp: TensorParallel) -> None:
        self._tp = tp

    def get_model_parallel_group(self) -> ProcessGroup | None:
        """Processes that share a copy of the model."""
        return self._tp.group

    def get_model_parallel_world_size(self) -> int:
        """How many these are."""
        return self._tp.size

    def get_model_parallel_rank(self) -> int:
        """This process among them."""
        return self._tp.rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_data_parallel_group(self) -> ProcessGroup | None:
        """Processes that hold the same part of other copies."""
        return self._tp.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of these."""
        return torch.distributed.get_process_group_ranks(self._tp.data_group)

    def get_data_parallel_world_size(self) -> int:
        """How many these are."""
        return torch.distributed.get_world_size(self._tp.data_group)

    def get_data_parallel_rank(self) -> int:
        """This process among them."""
        return torch.distributed.get_rank(self._tp.data_group)


def model_parallel_unit(tp: TensorParallel) -> ModelParallelUnit | None:
    """What DeepSpeed is to ask for its groups; None where its world is all processes."""
    return None if tp.size == 1 and tp.data_group is None else ModelParallelUnit(tp)
