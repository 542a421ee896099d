"""Muon: momentum whose singular values are made equal before it moves a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from relora_ds.optim.matrix import (
    Exchanged,
    MatrixOptimizer,
    MatrixUpdate,
    Needs,
    OfWhole,
    StateTensor,
    Steps,
)
from relora_ds.optim.matrix_wise.polar import POLAR_EXPRESS, Coefficients, polar

ShapeFactor = Literal["spectral", "original", "match_rms_adamw"]


@dataclass(frozen=True)
class Muon(MatrixOptimizer):
    """W -= lr c(m, n) polar(N), with N = (1 - mu) G + mu M and M = mu M + (1 - mu) G.

    Without Nesterov's look-ahead N is M. Decay is decoupled: W is multiplied by 1 - lr wd first.
    The arithmetic is that of torch.optim.Muon, but for the precision of the polar factor.
    """

    needs: ClassVar[Needs] = "whole"

    momentum: float = 0.95
    """mu."""
    nesterov: bool = True
    """Whether to look ahead."""
    coefficients: Coefficients = POLAR_EXPRESS
    """Steps towards the polar factor."""
    shape_factor: ShapeFactor = "original"
    """c(m, n) for a weight of m outputs and n inputs. `original`: sqrt(max(1, m / n)).
    `match_rms_adamw`: 0.2 sqrt(max(m, n)), which gives an update the root mean square of AdamW's,
    so that its learning rates can be kept. `spectral`: sqrt(m / n)."""
    precision: torch.dtype = torch.float32
    """In which the polar factor is computed."""

    def state(self, shape: torch.Size) -> Mapping[str, StateTensor]:
        return {"momentum": StateTensor(shape, "slice")}

    def exchanged(self, shapes: Sequence[torch.Size]) -> Exchanged:
        return Exchanged(to_owner=1, from_owner=1)

    def update(self, matrices: Sequence[MatrixUpdate]) -> Steps:
        (update,) = matrices
        momentum = update.matrix.state["momentum"]
        momentum.lerp_(update.grad, 1 - self.momentum)
        ahead = update.grad.lerp(momentum, self.momentum) if self.nesterov else momentum
        (direction,) = yield OfWhole([[ahead]], self.direction)
        update.master.mul_(1 - update.lr * update.weight_decay)
        update.master.add_(direction, alpha=-update.lr * self.factor(update.matrix.shape))

    def direction(self, matrices: torch.Tensor) -> tuple[torch.Tensor]:
        """Polar factors of whole matrices (batch, m, n), in their dtype."""
        return (polar(matrices.to(self.precision), self.coefficients).to(matrices.dtype),)

    def factor(self, shape: torch.Size) -> float:
        """c(m, n)."""
        m, n = shape
        if self.shape_factor == "match_rms_adamw":
            return 0.2 * math.sqrt(max(m, n))
        return math.sqrt(m / n if self.shape_factor == "spectral" else max(1.0, m / n))
