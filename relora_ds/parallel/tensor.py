"""Tensor parallelism: a process's place in its group, and the collectives that join the parts.

Activations between blocks are the same on every rank of the group. A block (attention, MLP, head)
passes its input through `copy_to`, works on the rank's part of the weights, and sums what the ranks
found with `reduce_from`: one all-reduce forward and one backward per block, whatever its
projections are made of. A tensor on the meta device has no values, so none are exchanged: the
structure of a part can be walked through without its group.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch.distributed import ProcessGroup

LowRankPlan = Literal["auto", "act", "fold"]


@dataclass(frozen=True)
class TensorParallel:
    """This process's part of one copy of the model.

    Args:
        rank: within the group.
        size: processes that share one copy.
        group: their process group; None for a group of one.
        data_group: processes that hold the same part of other copies; None for all processes.
        plan: how the gradient of a factor that every rank holds whole becomes complete. `act`: the
            (tokens, r) product in front of it is summed in every backward pass. `fold`: the
            factor's gradient is summed, once per optimizer step. `auto`: what moves fewer bytes.
        tokens: that one copy of the model reads per optimizer step; what `auto` goes by.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None
    plan: LowRankPlan = "fold"
    tokens: int = 0

    @property
    def suffix(self) -> str:
        """What tells this rank's files from those of the others; empty for a group of one."""
        return "" if self.size == 1 else f"_tp_{self.rank}"

    def sums_activations(self, features: int) -> bool:
        """Whether the plan is `act` for a factor that is `features` wide: r cancels out."""
        if self.size == 1 or self.plan == "fold":
            return False
        return self.plan == "act" or self.tokens < features

    def span(self, length: int) -> tuple[int, int]:
        """Elements [start, stop) of a dimension that belong to this rank.

        Parts differ by one element at most, so nothing has to be padded and no size is refused.
        """
        share, rest = divmod(length, self.size)
        start = self.rank * share + min(self.rank, rest)
        return start, start + share + (self.rank < rest)

    def copy_to(self, x: torch.Tensor) -> torch.Tensor:
        """The same tensor; its gradient is summed over the group."""
        if self.size == 1 or x.is_meta:
            return x
        from megatron.core.tensor_parallel import mappings

        copied = mappings.copy_to_tensor_model_parallel_region(x, group=self.group)
        return cast(torch.Tensor, _OwnGradient.apply(copied))

    def reduce_from(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the group; the gradient passes unchanged. May overwrite `x`."""
        if self.size == 1 or x.is_meta:
            return x
        from megatron.core.tensor_parallel import mappings

        # megatron-core 0.16.1 leaves a tensor that is not contiguous unreduced, without a word
        return mappings.reduce_from_tensor_model_parallel_region(x.contiguous(), group=self.group)

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
    size: int, plan: LowRankPlan, tokens: int, timeout_minutes: float
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
    return TensorParallel(group.rank(), size, group, data_group, plan, tokens)


class ModelParallelUnit:
    """What DeepSpeed asks of Megatron: names that megatron-core has dropped, and those it kept."""

    def __getattr__(self, name: str) -> Any:
        from megatron.core import parallel_state

        renamed = name.replace("get_model_parallel", "get_tensor_model_parallel")
        return getattr(parallel_state, renamed)
