"""Factorised training from scratch: y = (x A^T) B^T, no dense weight at any time."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.config.method import LowRankConfig
from relora_ds.methods.interface import Method
from relora_ds.parallel.linear import LinearSpec, Projection
from relora_ds.parallel.shape import whole_shape
from relora_ds.randomness import Stream


class FactorLinear(Projection):
    """A projection that *is* the product of `lora_B` (m, r) and `lora_A` (r, n), both trained."""

    def __init__(self, spec: LinearSpec, rank: int) -> None:
        super().__init__(spec)
        self.lora_A = nn.Parameter(torch.empty(rank, spec.in_features))
        self.lora_B = nn.Parameter(torch.empty(spec.out_features, rank))
        self.bias = self.allocate_bias()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.lora_A), self.lora_B)

    def cut_dims(self) -> dict[str, int]:
        return {"lora_B": 0} if self.spec.style == "column" else {"lora_A": 1}

    def partial_gradients(self) -> list[nn.Parameter]:
        if self.spec.tensor.size == 1:
            return []
        return [self.lora_A if self.spec.style == "column" else self.lora_B]

    def extra_saved(self) -> int:
        return whole_shape(self.lora_A)[0]

    def extra_repr(self) -> str:
        return (
            f"{self.spec.in_features} -> {self.spec.out_features}, r={whole_shape(self.lora_A)[0]}"
        )


class LowRank(Method[LowRankConfig]):
    """Every projection is a product of two trained factors."""

    def linear(self, spec: LinearSpec) -> Projection:
        return FactorLinear(spec, self.config.rank)

    def initialize(self, layer: Projection, dense: torch.Tensor) -> None:
        """`spectral`: the best rank-r approximation of the dense weight, its singular values split
        evenly. `xavier`: normal factors with standard deviation sqrt(2 / (fan_in + fan_out))."""
        assert isinstance(layer, FactorLinear)
        rank = layer.lora_A.shape[0]
        if self.config.init == "spectral":
            left, values, right = torch.linalg.svd(dense, full_matrices=False)
            root = values[:rank].sqrt()
            # the sign of a singular pair is arbitrary: fix it, or platforms start differently
            sign = torch.sign(left.gather(0, left.abs().argmax(0, keepdim=True)))[0, :rank]
            layer.lora_B.copy_(left[:, :rank] * (root * sign))
            layer.lora_A.copy_((root * sign).unsqueeze(1) * right[:rank])
            return
        for factor, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            std = math.sqrt(2.0 / sum(parameter.shape))
            stream = Stream(self.seed, factor, layer.spec.name)
            draw = stream.normal(0, parameter.numel(), dense.device)
            parameter.copy_(draw.view_as(parameter) * std)

    def dense_weight(self, layer: Projection) -> torch.Tensor:
        assert isinstance(layer, FactorLinear)
        return layer.lora_B.float() @ layer.lora_A.float()
