"""Factorised training from scratch: y = (x A^T) B^T, no dense weight at any time."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from relora_ds.config.methods.low_rank import LowRankConfig
from relora_ds.methods.interface import Method
from relora_ds.numerics.draws import draw_normal
from relora_ds.parallel.linear import LinearSpec, Projection
from relora_ds.parallel.low_rank import LowRankProjection
from relora_ds.randomness import Stream


class FactorLinear(LowRankProjection):
    """A projection that *is* the product of `lora_B` (m, r) and `lora_A` (r, n), both trained."""

    def __init__(self, spec: LinearSpec, rank: int) -> None:
        super().__init__(spec, rank)
        self.bias = self.allocate_bias()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.linear(x, self.lora_A)
        if self.shards_inner:
            inner = self.inner_exchange()(inner)
        return F.linear(inner, self.lora_B)

    def extra_repr(self) -> str:
        return f"{self.spec.in_features} -> {self.spec.out_features}, r={self.rank}"


class LowRank(Method[LowRankConfig]):
    """Every projection is a product of two trained factors."""

    def linear(self, spec: LinearSpec) -> Projection:
        return FactorLinear(spec, self.config.rank)

    def initialize(self, layer: Projection, dense: torch.Tensor) -> None:
        """`spectral`: the best rank-r approximation of the dense weight, its singular values split
        evenly. `xavier`: normal factors with standard deviation sqrt(2 / (fan_in + fan_out))."""
        assert isinstance(layer, FactorLinear)
        if self.config.init == "spectral":
            left, right = split_spectrum(dense, layer.rank)
            layer.lora_B.copy_(left)
            layer.lora_A.copy_(right)
            return
        for factor, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            std = math.sqrt(2.0 / sum(parameter.shape))
            stream = Stream(self.seed, factor, layer.spec.name)
            draw = draw_normal(stream, 0, parameter.numel(), dense.device)
            parameter.copy_(draw.view_as(parameter) * std)

    def dense_weight(self, layer: Projection) -> torch.Tensor:
        assert isinstance(layer, FactorLinear)
        return layer.lora_B.float() @ layer.lora_A.float()


def split_spectrum(dense: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of rank r, its singular values split evenly between two factors.

    By the eigenvectors of the smaller Gram matrix in fp64: many times as fast on a GPU as a
    singular value decomposition, and closer than one in fp32. Where several approximations are
    equally good, the solver decides.

    Args:
        dense: (m, n), fp32.

    Returns:
        (m, r) and (r, n), fp32.
    """
    exact = dense.double()
    wide = dense.shape[0] < dense.shape[1]
    gram = exact @ exact.t() if wide else exact.t() @ exact
    squares, vectors = torch.linalg.eigh(gram)  # ascending
    root = squares[-rank:].flip(0).clamp_min(0.0).pow(0.25)
    own = vectors[:, -rank:].flip(1)
    # a direction that the matrix does not have stays zero in both factors
    divisor = torch.where(root > 0.0, root, torch.inf)
    left = own * root if wide else exact @ own / divisor
    right = (exact.t() @ own / divisor).t() if wide else (own * root).t()
    # the sign of a singular pair is arbitrary: fix it, or platforms start differently
    sign = torch.sign(left.gather(0, left.abs().argmax(0, keepdim=True)))
    return (left * sign).float(), (right * sign.t()).float()
