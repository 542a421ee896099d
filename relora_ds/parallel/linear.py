"""What the model asks for when it needs a projection, and the plain answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LinearSpec:
    """One projection of the model, described before it is built.

    Args:
        name: full module name, such as ``model.layers.0.self_attn.q_proj``.
        in_features: width of the input.
        out_features: width of the output.
        bias: whether the projection adds a bias.
        style: the side along which tensor parallelism cuts it.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool
    style: Literal["column", "row"]


class DenseLinear(nn.Module):
    """y = x W^T + b with `weight` (out_features, in_features), as `torch.nn.Linear`.

    The parameters are allocated, not drawn: whoever builds the model fills them.
    """

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.out_features, spec.in_features))
        self.bias = nn.Parameter(torch.empty(spec.out_features)) if spec.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.spec.in_features} -> {self.spec.out_features}"


LinearFactory = Callable[[LinearSpec], nn.Module]
"""Builds the module that stands in for a projection. It has the call signature of DenseLinear."""
