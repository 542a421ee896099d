"""What the model asks for when it needs a projection, and the plain answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.numerics.products import linear
from relora_ds.parallel.footprint import Footprint, UpdateSize
from relora_ds.parallel.shape import TPShard, apply_shard
from relora_ds.parallel.tensor import SINGLE, TensorParallel


@dataclass(frozen=True)
class LinearSpec:
    """One projection of the model, described before it is built.

    Args:
        name: full module name, such as ``model.layers.0.self_attn.q_proj``.
        in_features: width of the input.
        out_features: width of the output.
        bias: whether the projection adds a bias.
        style: the side along which tensor parallelism cuts it. A `column` projection gets the whole
            input on every rank and returns a part of the output; a `row` projection gets a part of
            the input and returns the whole output.
        tp: the tensor-parallel group that shares it.
        pads: whether the side that is cut may be wider in memory than the weight, by columns of
            zeros: the output of a `column` projection, the input of a `row` projection.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool
    style: Literal["column", "row"]
    tp: TensorParallel = SINGLE
    pads: bool = False

    def product_shape(self, rows: int, cols: int, size: UpdateSize) -> tuple[int, int]:
        """Shape that a weight (rows, cols) has in the products of an update.

        Args:
            rows: outputs that are held here.
            cols: inputs that are held here.
            size: of the update.
        """
        if not self.pads:
            return rows, cols
        if self.style == "column":
            return size.mlp_width(rows), cols
        return rows, size.mlp_width(cols)


class Projection(nn.Module):
    """What stands in for a projection: (..., in_features) -> (..., out_features).

    The parameters are allocated, not drawn: whoever builds the model fills them, and then lets
    `shard_over_ranks` take this rank's part of them. A subclass says what it multiplies with in
    `product`, which is the same on a part as on the whole, and how it is cut in `shard_dims`.
    """

    bias: nn.Parameter | None
    recomputed = False
    """Whether the forward pass is run a second time within the backward pass; the model says so."""
    update: UpdateSize | None = None
    """The update under way, during which the weights stay as they are; see `weights_stay`."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.spec = spec

    def allocate_bias(self) -> nn.Parameter | None:
        """`bias` (out_features,), if the projection has one."""
        return nn.Parameter(torch.empty(self.spec.out_features)) if self.spec.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), or this rank's part of either."""
        out = self.product(x)
        if self.spec.style == "row":
            out = self.spec.tp.leave(out)
        bias = self.bias
        if bias is None:
            return out
        behind = out.shape[-1] - bias.numel()
        return out + (F.pad(bias, (0, behind)) if behind else bias)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """What the weights held here contribute to the output, without the bias.

        Args:
            x: may be wider than the weights, as the spec says; what is behind them is zero.

        Returns:
            `output_width` columns; what is behind those of the weights is zero.
        """
        raise NotImplementedError

    def output_width(self, rows: int) -> int:
        """Columns of what `product` returns.

        Args:
            rows: of the weight that is held here.
        """
        if self.update is None:
            return rows
        return self.spec.product_shape(rows, 0, self.update)[0]

    def shard_dims(self) -> dict[str, int]:
        """The dimension along which each parameter is cut; others are the same on every rank."""
        raise NotImplementedError

    def inner_dims(self) -> dict[str, int]:
        """The dimension of each parameter that is the r of a low-rank product and sharded."""
        return {}

    def shards(self) -> dict[str, TPShard]:
        """This rank's part of every parameter that is cut, before it is."""
        named, inner = dict(self.named_parameters(recurse=False)), self.inner_dims()
        bias = {"bias": 0} if self.spec.style == "column" else {}
        shards = {}
        for name, dim in (self.shard_dims() | bias | inner).items():
            if name in named:
                shape = named[name].shape
                span = range(*self.spec.tp.span(shape[dim]))
                shards[name] = TPShard(shape, dim, span, name in inner)
        return shards

    def shard_over_ranks(self) -> None:
        """Leave this rank's part of filled parameters and buffers."""
        shards = self.shards()
        for name, parameter in self.named_parameters(recurse=False):
            if name in shards:
                apply_shard(parameter, shards[name])

    def partial_gradients(self) -> list[nn.Parameter]:
        """Parameters that all ranks hold alike and whose gradients here are only shares of a sum:
        they have to be added up over the tensor-parallel group before they are used."""
        bias, spec = self.bias, self.spec
        # added behind the sum, to this rank's part of the sequence
        return [bias] if bias is not None and spec.style == "row" and spec.tp.sequence else []

    def begin_update(self, update: UpdateSize) -> None:
        """From here on the weights stay as they are: what is derived of them may be kept."""
        self.update = update

    def end_update(self) -> None:
        """The weights are going to change: forget what was derived of them."""
        self.update = None

    def describe(self, update: UpdateSize) -> str:
        """How the layer computes in such an update; empty if it has no choice."""
        return ""

    def held(self) -> tuple[torch.Tensor, ...]:
        """Live tensors beyond parameters and buffers that outlive a forward and backward pass.

        The memory meter asks for them during a step, so that what autograd saves of them does not
        count as activations. An attribute that keeps such a tensor is None while there is none.
        """
        return ()

    def footprint(self, size: UpdateSize) -> Footprint | None:
        """What one update costs beyond parameters and input, in closed form.

        None, the default, has `accounting.footprints` measure it without memory: a layer states
        its costs only where they are not what one forward and backward pass shows.
        """
        return None


@contextmanager
def weights_stay(layers: Iterable[Projection], update: UpdateSize) -> Iterator[None]:
    """Within it nobody changes the weights of projections, until the last backward pass has used
    them.

    Args:
        layers: the projections of a model.
        update: what runs through them meanwhile.
    """
    layers = list(layers)
    for layer in layers:
        layer.begin_update(update)
    try:
        yield
    finally:
        for layer in layers:
            layer.end_update()


class DenseLinear(Projection):
    """y = x W^T + b with `weight` (out_features, in_features), as `torch.nn.Linear`."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.empty(spec.out_features, spec.in_features))
        self.bias = self.allocate_bias()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.output_width(self.weight.shape[0]))

    def shard_dims(self) -> dict[str, int]:
        return {"weight": 0 if self.spec.style == "column" else 1}

    def extra_repr(self) -> str:
        return f"{self.spec.in_features} -> {self.spec.out_features}"


LinearFactory = Callable[[LinearSpec], Projection]
"""Builds the module that stands in for a projection."""
