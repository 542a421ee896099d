"""The gated feed-forward block (SwiGLU).

Shape suffixes: D model, F ffn; `...` any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.numerics.compiled import compiled
from relora_ds.numerics.dtypes import DTYPES
from relora_ds.numerics.padding import padded_width
from relora_ds.parallel.linear import LinearFactory, LinearSpec
from relora_ds.parallel.tensor import SINGLE, TensorParallel

_PADS_FROM = 4096
"""Tokens of a micro-batch from which copies of a weight take less than a tenth of its products'
time: 2 bytes at 3e12 per second against 6.5e14 operations per second, as on an H100."""


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up that keeps gate and up only: plain autograd would keep silu(gate) as well."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, F.silu(gate).mul_(grad)


@compiled
def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def pads_odd_widths(train: TrainConfig, device: str) -> bool:
    """Whether a run computes MLPs at aligned widths where theirs are not.

    Args:
        train: the run's settings.
        device: type of the device that computes.
    """
    enough = train.micro_batch_size * train.seq_length >= _PADS_FROM
    return train.pad_mlp == "on" or (train.pad_mlp == "auto" and device == "cuda" and enough)


def is_padded(config: ModelConfig, train: TrainConfig, device: str, tensor: int = 1) -> bool:
    """Whether a process computes MLPs at a width that is not that of their weights.

    Args:
        config: architecture.
        train: the run's settings.
        device: type of the device that computes.
        tensor: processes that share a copy of the model.
    """
    share, rest = divmod(config.intermediate_size, tensor)
    element = DTYPES[train.precision].itemsize
    widths = {share, share + (rest > 0)}
    odd = any(padded_width(width, element) != width for width in widths)
    return odd and pads_odd_widths(train, device)


class MLP(nn.Module):
    """y = down(silu(gate(x)) * up(x)).

    Args:
        config: architecture.
        linear: builds the three projections.
        name: full module name, such as ``model.layers.0.mlp``.
        tp: processes that share the block.
    """

    def __init__(
        self,
        config: ModelConfig,
        linear: LinearFactory,
        name: str,
        tp: TensorParallel = SINGLE,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.compiled = False
        """Whether torch's compiler makes the kernels of training."""
        width, ffn, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        # silu(0) * 0 = 0: columns of zeros behind F pass through, and so do their gradients
        into = bias, "column", tp, True
        self.gate_proj = linear(LinearSpec(f"{name}.gate_proj", width, ffn, *into))
        self.up_proj = linear(LinearSpec(f"{name}.up_proj", width, ffn, *into))
        self.down_proj = linear(LinearSpec(f"{name}.down_proj", ffn, width, bias, "row", tp, True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        x = self.tp.enter(x)
        both = self.gate_proj(x), self.up_proj(x)
        gated = _swiglu(*both) if self.compiled and self.training else _SwiGLU.apply(*both)
        return self.down_proj(gated)
