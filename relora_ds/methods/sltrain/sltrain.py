"""SLTrain (Han et al., arXiv 2406.02214): sparse plus low-rank weights, no dense weight kept."""

from __future__ import annotations

import math

import torch
from torch import nn

from relora_ds.config.methods.sltrain import SLTrainConfig
from relora_ds.config.sections import OptimizerConfig
from relora_ds.methods.formulation.choice import Choice, choose, product_size, rates_of
from relora_ds.methods.formulation.composed import ComposedProduct
from relora_ds.methods.interface import Method, pair_rule
from relora_ds.methods.sltrain.sparse_linear import SparseComposition, compose
from relora_ds.methods.sltrain.support import column_type, draw_support, support_size
from relora_ds.numerics.draws import draw_uniform
from relora_ds.optim.matrix import MatrixOptimizer
from relora_ds.parallel.footprint import Exchange, Footprint, UpdateSize
from relora_ds.parallel.linear import LinearSpec, Projection
from relora_ds.parallel.low_rank import LowRankProjection
from relora_ds.parallel.shape import TPShard, method_shape, tp_local_shape
from relora_ds.randomness import Stream

_Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class SparseLowRankLinear(LowRankProjection):
    """A projection that is scale * `lora_B` (m, r) @ `lora_A` (r, n) + S, all of it trained.

    S holds `values` (nnz,) at positions that never change: `row_starts`, int32 (m + 1,), and
    `columns`, int16 or int32 (nnz,), are integer buffers, which no cast of a model touches.
    """

    row_starts: torch.Tensor
    columns: torch.Tensor

    def __init__(self, spec: LinearSpec, config: SLTrainConfig) -> None:
        super().__init__(spec, config.rank)
        rows, cols = spec.out_features, spec.in_features
        count = support_size(rows, cols, config.sparsity)
        self.values = nn.Parameter(torch.empty(count))
        self.bias = self.allocate_bias()
        self.register_buffer("row_starts", torch.zeros(rows + 1, dtype=torch.int32))
        self.register_buffer("columns", torch.zeros(count, dtype=column_type(cols)))
        self.scale = config.resolved_scale
        self._asked = config.keep_composed, config.gradient
        self._composed: torch.Tensor | None = None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        # outside an update nobody says when the weights change
        alone = UpdateSize(x.numel() // x.shape[-1], 1, x.dtype, "layer", x.device.type)
        choice = self._choice(self.update or alone)
        pair, parts = (self.join_factors, self.divide_factors), self._parts()
        width = self.output_width(self.lora_B.shape[0])
        how = SparseComposition(self.scale, choice.gradient, self.recomputed, *pair, width)
        if choice.form == "step" and self.update is not None and self._composed is None:
            with torch.no_grad():
                self._composed = how.compose(*how.factors(x, *parts[:2]), *parts[2:])
        out = ComposedProduct.apply(x, self._composed, how, *parts)
        assert isinstance(out, torch.Tensor)
        return out

    def end_update(self) -> None:
        super().end_update()
        self._composed = None

    def describe(self, update: UpdateSize) -> str:
        return str(self._choice(update))

    def _choice(self, update: UpdateSize) -> Choice:
        keeps, gradient = self._asked
        asked = update.formulation if keeps == "auto" else keeps
        size = product_size(self, update, self.columns.numel())
        rates = rates_of(update.device, update.dtype)
        return choose(size, asked, update.keeps_composed, rates, gradient)

    def shards(self) -> dict[str, TPShard]:
        return super().shards() | {"values": TPShard(self.values.shape, 0, self._own_values())}

    def shard_over_ranks(self) -> None:
        own = self._own_values()
        super().shard_over_ranks()
        spec, starts = self.spec, self.row_starts
        if isinstance(own, range):
            self.columns = self.columns[own.start : own.stop].clone()
            if spec.style == "column":  # whole rows
                first, last = spec.tp.span(spec.out_features)
                self.row_starts = starts[first : last + 1] - starts[first]
            return
        first, _ = spec.tp.span(spec.in_features)
        # how many of the values before the start of a row are kept
        self.row_starts = torch.searchsorted(own, starts.long().cpu()).to(starts)
        self.columns = self.columns[own.to(starts.device)] - first

    def _own_values(self) -> range | torch.Tensor:
        """Which of the uncut layer's values lie in this rank's part of the matrix."""
        spec = self.spec
        if self.columns.is_meta:  # where they lie is not known: shares of their number
            return range(*spec.tp.span(self.columns.numel()))
        if spec.style == "column":
            first, last = spec.tp.span(spec.out_features)
            return range(int(self.row_starts[first]), int(self.row_starts[last]))
        first, last = spec.tp.span(spec.in_features)
        columns = self.columns.cpu()
        return ((columns >= first) & (columns < last)).nonzero().flatten()

    def held(self) -> tuple[torch.Tensor, ...]:
        return () if self._composed is None else (self._composed,)

    def footprint(self, size: UpdateSize) -> Footprint:
        # stated: the positions of the support and a joined factor are smaller than the weight, but
        # they are there beside W or its gradient, of which one lives at a time
        working = size.dtype.itemsize
        rows, cols = tp_local_shape(self.lora_B)[0], tp_local_shape(self.lora_A)[1]
        dense = math.prod(self.spec.product_shape(rows, cols, size))
        joined = (
            method_shape(getattr(self, self.inner_factor[0])).numel() if self.shards_inner else 0
        )
        keeps = self._choice(size).form == "step"
        return Footprint(
            exchanges=self._exchanges(size.micro_batches, joined, keeps) if joined else (),
            held_bytes=working * dense if keeps else 0,
            scratch_bytes=working * (dense + joined) + 4 * self.columns.numel(),
        )

    def _exchanges(self, micro_batches: int, factor: int, keeps: bool) -> tuple[Exchange, ...]:
        """The cut factor is joined wherever W is composed or a gradient formed: unlike (T, r)
        activations that serves a product of which x A^T is no part."""
        composed = 1 if keeps else micro_batches
        again = 0 if keeps or not self.recomputed else micro_batches
        backward = micro_batches + again
        return (
            Exchange("all_gather", "forward", composed, composed * factor),
            Exchange("all_gather", "backward", backward, backward * factor),
            Exchange("reduce_scatter", "backward", micro_batches, micro_batches * factor),
        )

    def _parts(self) -> _Parts:
        return self.lora_A, self.lora_B, self.values, self.row_starts, self.columns

    def extra_repr(self) -> str:
        return (
            f"{self.spec.in_features} -> {self.spec.out_features}, "
            f"r={self.rank}, nnz={self.columns.numel()}"
        )


class SLTrain(Method[SLTrainConfig]):
    """Every projection is a trained low-rank product plus a trained sparse matrix."""

    def linear(self, spec: LinearSpec) -> Projection:
        return SparseLowRankLinear(spec, self.config)

    def initialize(self, layer: Projection, dense: torch.Tensor) -> None:
        """A uniform on +-1/sqrt(n), B zero, values uniform on +-1/sqrt(n) (the authors' code).

        The dense draw is not used: spectral and random starts were worse in a pilot (87.1 and 95.2
        against 83.5 in perplexity after 0.8 M tokens).
        """
        assert isinstance(layer, SparseLowRankLinear)
        device, bound = dense.device, 1.0 / math.sqrt(layer.spec.in_features)
        for purpose, parameter in (("lora_A", layer.lora_A), ("values", layer.values)):
            stream = Stream(self.seed, purpose, layer.spec.name)
            draw = draw_uniform(stream, 0, parameter.numel(), device)
            parameter.copy_(draw.mul_(2.0).sub_(1.0).mul_(bound).view_as(parameter))
        layer.lora_B.zero_()
        row_starts, columns = self._support(layer)
        layer.row_starts, layer.columns = row_starts.to(device), columns.to(device)

    def lay_out(self, layer: Projection) -> None:
        assert isinstance(layer, SparseLowRankLinear)
        layer.row_starts, layer.columns = self._support(layer)

    def dense_weight(self, layer: Projection) -> torch.Tensor:
        assert isinstance(layer, SparseLowRankLinear)
        row_starts, columns = layer.row_starts, layer.columns
        if columns.is_meta:  # only the parameters were handed over: the support follows from them
            row_starts, columns = self._support(layer)
        trained = (layer.lora_A, layer.lora_B, layer.values)
        lora_a, lora_b, values = (parameter.detach().float() for parameter in trained)
        device = values.device
        return compose(
            lora_a, lora_b, values, row_starts.to(device), columns.to(device), layer.scale
        )

    def parts(self, layer: Projection) -> dict[str, torch.Tensor]:
        """The low-rank product and the sparse matrix."""
        assert isinstance(layer, SparseLowRankLinear)
        lora_a, lora_b = layer.lora_A.detach().float(), layer.lora_B.detach().float()
        low_rank = layer.scale * lora_b @ lora_a
        return {"low-rank": low_rank, "sparse": self.dense_weight(layer) - low_rank}

    def matrix_optimizer(
        self, settings: OptimizerConfig, name: str, parameter: nn.Parameter
    ) -> MatrixOptimizer | None:
        return pair_rule(settings, name, self.config.resolved_scale)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """The values are elements of a matrix, though they are kept in a vector."""
        return name.endswith(".values") or super().decays(name, parameter)

    def _support(self, layer: SparseLowRankLinear) -> tuple[torch.Tensor, torch.Tensor]:
        spec = layer.spec
        return draw_support(
            self.seed, spec.name, spec.out_features, spec.in_features, layer.columns.numel()
        )
