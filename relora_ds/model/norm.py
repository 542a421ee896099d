"""Root-mean-square normalisation.

Shape suffixes: T tokens, D model; `...` any leading dimensions.
"""

# ruff: noqa: N803, N806 - capital suffixes are tensor shapes
from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from relora_ds.numerics.compiled import compiled
from relora_ds.parallel.shape import tp_local_shape
from relora_ds.parallel.tensor import SINGLE, TensorParallel


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, statistics and product in fp32 whatever x's dtype.

    `weight` (D,) is allocated, not drawn: whoever builds the model fills it.

    Args:
        size: D, the width that is normalised.
        eps: added to the mean square.
        tp: processes that share the model.
    """

    def __init__(self, size: int, eps: float, tp: TensorParallel = SINGLE) -> None:
        super().__init__()
        self.eps = eps
        self.tp = tp
        self.compiled = False
        """Whether torch's compiler makes the kernels of training."""
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D) in x's dtype."""
        if self.compiled and self.training:
            return _norm(x, self.weight, self.eps)
        if x.is_cuda:
            # torch's kernel accumulates half precision in fp32, rounds once, at the end, and keeps
            # only x and one number per row for the backward pass
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        out = _RMSNorm.apply(x, self.weight, self.eps)
        assert isinstance(out, torch.Tensor)
        return out

    def partial_gradients(self) -> list[nn.Parameter]:
        """The weight, where this rank normalises its part of the sequence only."""
        return [self.weight] if self.tp.sequence else []

    def extra_repr(self) -> str:
        return f"{tp_local_shape(self.weight).numel()}, eps={self.eps}"


class AddAndNorm(RMSNorm):
    """x + added, and the norm of that, which one pass computes where it is compiled."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: torch.Tensor, added: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of (..., D) -> the sum and its norm, both (..., D) in x's dtype."""
        if self.compiled and self.training:
            return _add_and_norm(x, added, self.weight, self.eps)
        total = x + added
        return total, super().forward(total)


@compiled
def _norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    wide = _wide(x)
    inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * inverse * weight_D).to(x.dtype)


@compiled
def _add_and_norm(
    x: torch.Tensor, added: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    # what later layers add to is rounded, and so what is normalised is too
    total = x + added
    wide = _wide(total)
    inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return total, (wide * inverse * weight_D).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """The norm where torch has no kernel of its own: as few passes over x as plain operations
    allow, with x and one number per row kept. torch's composition makes three times as many."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        rows_TD = _wide(x).reshape(-1, x.shape[-1])
        inverse_T1 = rows_TD.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse_T1)
        return (rows_TD * inverse_T1).mul_(weight_D).to(x.dtype).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """With n = x / rms: dw = sum of dy n over rows, dx = (w dy - n mean(w dy n)) / rms."""
        x, weight_D, inverse_T1 = ctx.saved_tensors
        rows_TD, wide_D = _wide(x).reshape(-1, x.shape[-1]), _wide(weight_D)
        grad_TD = _wide(grad).reshape(rows_TD.shape)
        work_TD = grad_TD * rows_TD
        mean_T = torch.mv(work_TD, wide_D).div_(x.shape[-1])
        grad_weight_D = torch.mv(work_TD.t(), inverse_T1.view(-1))
        torch.mul(grad_TD, wide_D, out=work_TD).mul_(inverse_T1)
        work_TD.addcmul_(rows_TD, inverse_T1.pow(3).mul_(mean_T.unsqueeze(1)), value=-1.0)
        return work_TD.to(x.dtype).view_as(x), grad_weight_D.to(weight_D.dtype), None


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In the dtype of statistics: fp32, or fp64 where x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
