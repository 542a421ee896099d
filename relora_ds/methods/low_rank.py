"""Factorised training from scratch: y = (x A^T) B^T, no dense weight at any time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from relora_ds.config.methods.low_rank import LowRankConfig
from relora_ds.config.sections import OptimizerConfig
from relora_ds.methods.interface import Method, pair_rule
from relora_ds.numerics.draws import draw_normal
from relora_ds.numerics.products import linear
from relora_ds.optim.matrix import MatrixOptimizer
from relora_ds.parallel.linear import LinearSpec, Projection
from relora_ds.parallel.low_rank import LowRankProjection
from relora_ds.randomness import Stream

_DECOMPOSED = 768
"""Smaller side up to which a random weight is decomposed: a third of a second on one core. The time
grows with the cube."""
_NODES = 1 << 16  # of the integral over a spectrum


class FactorLinear(LowRankProjection):
    """A projection that *is* the product of `lora_B` (m, r) and `lora_A` (r, n), both trained."""

    def __init__(self, spec: LinearSpec, rank: int) -> None:
        super().__init__(spec, rank)
        self.bias = self.allocate_bias()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        inner = linear(x, self.lora_A)
        if self.shards_inner:
            inner = self.inner_exchange()(inner)
        return linear(inner, self.lora_B, self.output_width(self.lora_B.shape[0]))

    def extra_repr(self) -> str:
        return f"{self.spec.in_features} -> {self.spec.out_features}, r={self.rank}"


class LowRank(Method[LowRankConfig]):
    """Every projection is a product of two trained factors."""

    def linear(self, spec: LinearSpec) -> Projection:
        return FactorLinear(spec, self.config.rank)

    def initialize(self, layer: Projection, dense: torch.Tensor) -> None:
        """`spectral`, `svd`: the best rank-r approximation of the dense weight, its singular values
        split evenly. `xavier`: normal factors with standard deviation
        sqrt(2 / (fan_in + fan_out))."""
        assert isinstance(layer, FactorLinear)
        if self.config.init != "xavier":
            left, right = split_spectrum(dense, layer.rank)
            layer.lora_B.copy_(left)
            layer.lora_A.copy_(right)
            return
        for factor, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            std = math.sqrt(2.0 / sum(parameter.shape))
            stream = Stream(self.seed, factor, layer.spec.name)
            draw = draw_normal(stream, 0, parameter.numel(), dense.device)
            parameter.copy_(draw.view_as(parameter) * std)

    def initialize_at_random(
        self, layer: Projection, draw: Callable[[], torch.Tensor], std: float
    ) -> None:
        """As `initialize`; with `spectral`, what a large weight would be approximated by is drawn
        directly."""
        assert isinstance(layer, FactorLinear)
        shape = layer.spec.out_features, layer.spec.in_features
        if self.config.init != "spectral" or min(shape) <= _DECOMPOSED:
            self.initialize(layer, draw())
            return
        streams = (Stream(self.seed, side, layer.spec.name) for side in ("left", "right"))
        device = layer.lora_A.device
        left, right = (
            draw_frame(stream, length, layer.rank, device)
            for stream, length in zip(streams, shape, strict=True)
        )
        values = std * expected_singular_values(*shape, layer.rank)
        root = torch.from_numpy(values).sqrt().to(device)
        left, right = _with_fixed_signs(left * root, (right * root).t())
        layer.lora_B.copy_(left)
        layer.lora_A.copy_(right)

    def matrix_optimizer(
        self, settings: OptimizerConfig, name: str, parameter: nn.Parameter
    ) -> MatrixOptimizer | None:
        return pair_rule(settings, name)

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
    return _with_fixed_signs(left, right)


def draw_frame(stream: Stream, length: int, count: int, device: torch.device) -> torch.Tensor:
    """Orthonormal vectors in uniformly distributed directions: as those singular vectors of a
    matrix of independent normal draws that belong to its largest singular values.

    The triangular factor of a Cholesky decomposition is that of Gram and Schmidt's process, so that
    the frame is uniform, and all of it is products of matrices. fp64 leaves it orthonormal to the
    precision of fp32 for any `count` below `length`.

    Returns:
        fp64, (length, count) on `device`.
    """
    normal = draw_normal(stream, 0, length * count, device).view(length, count).double()
    lower = torch.linalg.cholesky(normal.t() @ normal)
    return torch.linalg.solve_triangular(lower.t(), normal, upper=True, left=False)


def expected_singular_values(rows: int, columns: int, count: int) -> np.ndarray:
    """The largest singular values, descending, of a matrix of independent draws of N(0, 1).

    Quantiles of the Marchenko-Pastur distribution. Single matrices differ from them by less the
    larger they are: with 1,000 rows and columns by less than 1 %, mostly by less than 0.1 %.

    Returns:
        fp64, (count,).
    """
    larger, smaller = max(rows, columns), min(rows, columns)
    ratio = smaller / larger
    # the squares, over `larger`, are 1 + ratio + 2 sqrt(ratio) cos(angle): no edge is singular
    angle = np.linspace(0.0, math.pi, _NODES)
    middle = (angle[1:] + angle[:-1]) / 2.0
    density = np.sin(middle) ** 2 / (1.0 + ratio + 2.0 * math.sqrt(ratio) * np.cos(middle))
    above = np.concatenate([[0.0], np.cumsum(density)])
    wanted = np.interp((np.arange(count) + 0.5) / smaller, above / above[-1], angle)
    return np.sqrt(larger * (1.0 + ratio + 2.0 * math.sqrt(ratio) * np.cos(wanted)))


def _with_fixed_signs(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sign of a singular pair is arbitrary: fix it, or platforms start differently.

    Args:
        left: (m, r).
        right: (r, n).

    Returns:
        Both in fp32; the largest entry of every left vector is positive.
    """
    sign = torch.sign(left.gather(0, left.abs().argmax(0, keepdim=True)))
    return (left * sign).float(), (right * sign.t()).float()
