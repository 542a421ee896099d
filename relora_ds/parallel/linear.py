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


class Projection(nn.Module):
    """What stands in for a projection: (..., in_features) -> (..., out_features).

    The parameters are allocated, not drawn: whoever builds the model fills them.
    """

    recomputed = False
    """Whether the forward pass is run a second time within the backward pass; the model says so."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.spec = spec

    def held(self) -> tuple[torch.Tensor, ...]:
        """Tensors beyond parameters and buffers that outlive one forward and backward pass."""
        return ()

    def extra_saved(self) -> int:
        """Elements per token that are kept for the backward pass beside the input."""
        return 0

    def held_elements(self) -> int:
        """Elements of what `held` returns while a step is under way."""
        return 0

    def scratch_bytes(self, working: int) -> int:
        """Most bytes of weight-sized temporaries within one forward or backward pass.

        Args:
            working: bytes of a working weight.
        """
        return 0


class DenseLinear(Projection):
    """y = x W^T + b with `weight` (out_features, in_features), as `torch.nn.Linear`."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.empty(spec.out_features, spec.in_features))
        self.bias = nn.Parameter(torch.empty(spec.out_features)) if spec.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.spec.in_features} -> {self.spec.out_features}"


LinearFactory = Callable[[LinearSpec], Projection]
"""Builds the module that stands in for a projection."""
