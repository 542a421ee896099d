"""Root-mean-square normalisation.

Shape suffixes: D model; `...` any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

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
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D) in x's dtype."""
        # torch's operator accumulates half precision in fp32 and rounds once, at the end. Its fused
        # CUDA kernel keeps only x and one number per row for the backward pass.
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def partial_gradients(self) -> list[nn.Parameter]:
        """The weight, where this rank normalises its part of the sequence only."""
        return [self.weight] if self.tp.sequence else []

    def extra_repr(self) -> str:
        return f"{tp_local_shape(self.weight).numel()}, eps={self.eps}"
