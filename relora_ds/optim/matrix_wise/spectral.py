"""Spectral updates of factor pairs: momentum of the product B A, its singular values made equal.

Both factors move along the polar factor of the change that their momenta mean for the product, as
in sMuon (arXiv 2608.14492). With one momentum per factor it takes half of Adam's state, and it is
defined where a factor is zero, as B is after a merge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

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
from relora_ds.optim.matrix_wise.inverse_root import inverse_root

_RIDGE = 1e-12
"""Added to the diagonal of ones of a Gram matrix, which may have less than full rank."""
_TINY = torch.finfo(torch.float64).tiny
_CANCELLED = 1e-6
"""Of |N_B|^2 |A|^2 + |B|^2 |N_A|^2, below which |D|^2 is too small for its Gram matrix to be
positive definite as rounded."""
_ROUNDING = 1e-13
"""Of the same, what is then added to the Gram matrix's diagonal: more than its rounding, so that
rounding moves nothing."""
_SQUARINGS = 6
"""Of a Gram matrix, for its largest eigenvalue: at most 10 % too large for r up to 512."""


@dataclass(frozen=True)
class SpectralPair(MatrixOptimizer):
    """B -= lr/2 c O A^T and A -= lr/2 c B^T O, with O = polar(D) and D = N_B A + B N_A.

    A is (r, n), B is (m, r). M = mu M + (1 - mu) G and N = (1 - mu) G + mu M per factor; without
    Nesterov's look-ahead N is M. c = sqrt(max(1, m / n)). Decay is decoupled: each factor is
    multiplied by 1 - lr wd first. A frozen row of A or column of B takes part in O and stays as it
    is.

    Nothing of the size of B A is formed. With P = [N_B B] and Q = [A^T N_A^T], which have 2 r
    columns, D = P Q^T. In an orthonormal basis E of Q's columns, Q = E R, the Gram matrix of D is
    R P^T P R^T, and O = P R^T (R P^T P R^T)^(-1/2) E^T: all else is (2 r, 2 r), in fp64.
    """

    needs: ClassVar[Needs] = "pair"

    momentum: float = 0.95
    """mu."""
    nesterov: bool = True
    """Whether to look ahead."""
    normalized: bool = False
    """Whether steps are divided by s (|A|^2 + |B|^2) / 2 with spectral norms, so that the weight
    s B A moves by at most lr c, whatever the factors' sizes."""
    scale: float = 1.0
    """s, of the product in the weight."""

    def state(self, shape: torch.Size) -> Mapping[str, StateTensor]:
        return {"momentum": StateTensor(shape, "slice")}

    def exchanged(self, shapes: Sequence[torch.Size]) -> Exchanged:
        return Exchanged(to_owner=2, from_owner=1)

    def update(self, matrices: Sequence[MatrixUpdate]) -> Steps:
        values = [(update.master, self._ahead(update)) for update in matrices]
        directions = yield OfWhole(values, self.directions)
        for update, direction in zip(matrices, directions, strict=True):
            update.move(direction)

    def _ahead(self, update: MatrixUpdate) -> torch.Tensor:
        momentum, grad = update.matrix.state["momentum"], update.live_grad()
        momentum.lerp_(grad, 1 - self.momentum)
        return grad.lerp(momentum, self.momentum) if self.nesterov else momentum

    def directions(
        self,
        lora_a: torch.Tensor,
        ahead_a: torch.Tensor,
        lora_b: torch.Tensor,
        ahead_b: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a learning rate of one takes off whole factors.

        Args:
            lora_a: (batch, r, n).
            ahead_a: N_A, like it.
            lora_b: (batch, m, r).
            ahead_b: N_B, like it.

        Returns:
            Like `lora_a` and like `lora_b`.
        """
        rank, n = lora_a.shape[-2:]
        m = lora_b.shape[-2]
        left = torch.cat([ahead_b, lora_b], -1).double()
        frame = _Frame(torch.cat([lora_a, ahead_a], -2).double())
        left_gram = left.mT @ left
        across = frame.triangle @ left_gram  # E^T Q P^T P
        gram = across @ frame.triangle.mT
        terms = _trace(left_gram[..., :rank, :rank]) * _trace(frame.gram[..., :rank, :rank])
        terms += _trace(left_gram[..., rank:, rank:]) * _trace(frame.gram[..., rank:, rank:])
        cancelled = _trace(gram) < _CANCELLED * terms
        gram.diagonal(dim1=-2, dim2=-1).add_((cancelled * _ROUNDING * terms)[..., 0])
        size = _trace(gram).clamp(min=_TINY)
        rough, root = inverse_root(gram / size)
        factor = 0.5 * math.sqrt(max(1.0, m / n)) / size.sqrt()
        if self.normalized:
            sizes = largest_eigenvalue(frame.gram[..., :rank, :rank])
            sizes = sizes + largest_eigenvalue(left_gram[..., rank:, rank:])
            factor = factor / (0.5 * self.scale * sizes.clamp(min=_RIDGE))[:, None, None]
        # O = P R^T rough root E^T. Rounding of what `root` is multiplied with, in fp32, is not
        # magnified where `rough` meets P R^T on its left or R P^T on its right; hence both orders.
        # E^T A^T, the triangle's first columns, has zeros below the first rows.
        rooted = root[..., :rank] @ frame.triangle[..., :rank, :rank].float()
        roughened = rough @ torch.cat([rooted, across[..., rank:]], -1)
        for_b, for_a = factor * roughened[..., :rank], factor * roughened[..., rank:]
        along_a = frame.combine((root @ for_a.float()).double())
        along_b = (frame.triangle.mT @ for_b).mT @ left.mT  # twice as fast as its transpose
        return along_a.to(lora_a.dtype), along_b.to(lora_b.dtype).mT


def _trace(gram: torch.Tensor) -> torch.Tensor:
    """Of matrices (batch, k, k): (batch, 1, 1)."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


class _Frame:
    """An orthonormal basis E of the columns of Q, in products only: Q = E `triangle`.

    The columns are scaled to length one before they are multiplied with each other, so that a
    small one is not lost beside a large one. One that lies in the span of those before it adds no
    direction, and its row of the triangle is zero.

    Args:
        rows: Q^T (batch, k, n), fp64; may have less than full rank.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows
        self.gram = rows @ rows.mT
        """Q^T Q (batch, k, k)."""
        lengths = self.gram.diagonal(dim1=-2, dim2=-1).sqrt()
        self._inverse = torch.where(lengths > 0, 1 / lengths, 0.0).unsqueeze(-1)
        scaled = (self.gram * self._inverse).mul_(self._inverse.mT)
        scaled.diagonal(dim1=-2, dim2=-1).fill_(1 + _RIDGE)
        self._upper, _ = torch.linalg.cholesky_ex(scaled, upper=True)  # which waits for nothing
        # of a column in the span of others the ridge alone is left, about twice
        adds = self._upper.diagonal(dim1=-2, dim2=-1).square() > 10 * _RIDGE
        self.triangle = (self._upper * adds.unsqueeze(-1)).mul_(lengths.unsqueeze(-2))
        """(batch, k, k), upper triangular."""

    def combine(self, weights: torch.Tensor) -> torch.Tensor:
        """(E `weights`)^T (batch, j, n), for weights (batch, k, j)."""
        solved = torch.linalg.solve_triangular(self._upper, weights, upper=True)
        return (self._inverse * solved).mT @ self._rows


def largest_eigenvalue(gram: torch.Tensor) -> torch.Tensor:
    """An upper bound of the largest eigenvalue of positive semi-definite matrices.

    By repeated squaring: products of matrices only. Between the eigenvalue and k^(1/64) times it.

    Args:
        gram: (batch, k, k), fp64.

    Returns:
        (batch,), 0 for a matrix of zeros.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    power, exponent, logarithm = gram, 1, torch.zeros_like(trace)
    for _ in range(_SQUARINGS):
        size = power.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=torch.finfo(gram.dtype).tiny)
        power = power / size[..., None, None]
        power, logarithm, exponent = power @ power, 2 * (logarithm + size.log()), 2 * exponent
    size = power.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=torch.finfo(gram.dtype).tiny)
    return torch.where(trace > 0, ((logarithm + size.log()) / exponent).exp(), 0.0)
