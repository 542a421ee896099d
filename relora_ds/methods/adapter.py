"""The adapted projection W + scale * B @ A, shared by LoRA and everything built on it.

Shapes: x (T, n), W (m, n), A (r, n), B (m, r), y (T, m).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from relora_ds.config.methods.adapter import AdapterConfig
from relora_ds.config.sections import OptimizerConfig
from relora_ds.errors import DivergenceError
from relora_ds.methods.formulation.choice import Choice, choose, product_size, rates_of
from relora_ds.methods.formulation.composed import ComposedProduct, Composition, Gradients
from relora_ds.methods.interface import Adapter, Method, pair_rule, projection_layers
from relora_ds.numerics.base_weight import WeightEdit
from relora_ds.numerics.draws import draw_uniform
from relora_ds.numerics.padding import cut, padded
from relora_ds.numerics.products import gradient, matmul, place_of, scaled
from relora_ds.optim.matrix import MatrixOptimizer
from relora_ds.parallel.footprint import UpdateSize
from relora_ds.parallel.linear import LinearSpec, Projection
from relora_ds.parallel.low_rank import InnerExchange, LowRankProjection
from relora_ds.parallel.shape import global_shape, method_shape, shard_of
from relora_ds.randomness import Stream

_SPLIT = Choice("split", "low_rank")


class _AdapterProduct(torch.autograd.Function):
    """y = x W^T + scale * (x A^T) B^T, saving x and what was exchanged of x A^T.

    Where nothing is exchanged, the (T, r) product is computed again in the backward pass, which
    costs 2 T r n operations and saves T r elements per projection. W is frozen: no gradient of its
    size is ever formed. Over tensor-parallel ranks y and the gradient of x are shares of a sum that
    the caller forms. Where x or y is wider than the weight, copies with zeros take the places of
    the weight and the factors in every product, and gradients are cut.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scale: float,
        exchange: InnerExchange | None,
        width: int,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        whole_a = padded(lora_a, lora_a.shape[0], rows.shape[1])
        whole_b = padded(lora_b, width, lora_b.shape[1])
        inner, kept = matmul(rows, whole_a.t()), ()
        if exchange is not None:
            inner = exchange.forward(inner)
            kept = (inner,)
        ctx.save_for_backward(x, weight, lora_a, lora_b, *kept)
        ctx.scale, ctx.exchange = scale, exchange
        ctx.places = place_of(lora_a), place_of(lora_b)
        out = matmul(rows, padded(weight, width, rows.shape[1]).t())
        out.addmm_(inner, whole_b.t(), alpha=scale)
        return out.view(*x.shape[:-1], width)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, lora_a, lora_b, *kept = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        width, whole_a = grad.shape[1], padded(lora_a, lora_a.shape[0], rows.shape[1])
        grad_inner = matmul(grad, padded(lora_b, width, lora_b.shape[1])).mul_(ctx.scale)
        if ctx.exchange is not None:
            grad_inner = ctx.exchange.backward(grad_inner)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = matmul(grad, padded(weight, width, rows.shape[1]))
            grad_x = grad_x.addmm_(grad_inner, whole_a).view_as(x)
        if ctx.needs_input_grad[2]:
            grad_a = gradient(grad_inner.t(), rows, lora_a.shape, ctx.places[0])
        if ctx.needs_input_grad[3]:
            inner = kept[0] if kept else matmul(rows, whole_a.t())
            grad_b = cut(matmul(grad.t(), inner), *lora_b.shape)
            grad_b = scaled(grad_b, ctx.scale, ctx.places[1])
        return grad_x, None, grad_a, grad_b, None, None, None


@dataclass(frozen=True)
class _Adapted(Composition):
    """W_eff = W + scale * B @ A with a frozen W, of which no gradient is formed."""

    def compose(
        self, lora_a: torch.Tensor, lora_b: torch.Tensor, *rest: torch.Tensor
    ) -> torch.Tensor:
        weight, shape = rest[0], (lora_b.shape[0], lora_a.shape[1])
        if weight.shape == shape:
            return torch.addmm(weight, lora_b, lora_a, alpha=self.scale)
        # a sum out of place copies its first term just so
        return padded(weight, *shape).addmm_(lora_b, lora_a, alpha=self.scale)

    def of_dense(self, full: torch.Tensor, *rest: torch.Tensor) -> Gradients:
        return (None,)

    def of_rows(self, rows: torch.Tensor, grad: torch.Tensor, *rest: torch.Tensor) -> Gradients:
        return (None,)


class AdapterLinear(LowRankProjection):
    """A frozen `weight` (m, n) beside the trained factors `lora_A` (r, n) and `lora_B` (m, r).

    With trainable scaling the factor is tanh(`scaling`) and the fixed `scale` is 1.
    """

    def __init__(self, spec: LinearSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config.rank)
        shape = spec.out_features, spec.in_features
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.bias = self.allocate_bias()
        self.scaling = nn.Parameter(torch.empty(1)) if config.trainable_scaling else None
        self.scale = 1.0 if config.trainable_scaling else config.scale
        self._composed: torch.Tensor | None = None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        lora_b = self.lora_B
        if self.scaling is not None:
            lora_b = lora_b * torch.tanh(self.scaling)
        choice = _SPLIT if self.update is None else self._choice(self.update)
        width = self.output_width(lora_b.shape[0])
        if choice.form == "split":
            exchange = self.inner_exchange() if self.shards_inner else None
            parts = self.weight, self.lora_A, lora_b
            out = _AdapterProduct.apply(x, *parts, self.scale, exchange, width)
        else:
            pair = self.join_factors, self.divide_factors
            keep = self.recomputed and choice.form == "layer"
            how = _Adapted(self.scale, choice.gradient, keep, *pair, width)
            if choice.form == "step" and self._composed is None:
                with torch.no_grad():
                    factors = how.factors(x, self.lora_A, lora_b)
                    self._composed = how.compose(*factors, self.weight)
            out = ComposedProduct.apply(x, self._composed, how, self.lora_A, lora_b, self.weight)
        assert isinstance(out, torch.Tensor)
        return out

    def end_update(self) -> None:
        super().end_update()
        self._composed = None

    def held(self) -> tuple[torch.Tensor, ...]:
        return () if self._composed is None else (self._composed,)

    def describe(self, update: UpdateSize) -> str:
        return str(self._choice(update))

    def _choice(self, update: UpdateSize) -> Choice:
        rates = rates_of(update.device, update.dtype)
        size = product_size(self, update)
        return choose(size, update.formulation, update.keeps_composed, rates)

    def shard_dims(self) -> dict[str, int]:
        return super().shard_dims() | {"weight": 0 if self.spec.style == "column" else 1}

    def partial_gradients(self) -> list[nn.Parameter]:
        partial = super().partial_gradients()
        if self.scaling is not None and self.spec.tp.size > 1:
            partial.append(self.scaling)  # summed of a part of B, or of a part of its gradient
        return partial

    def merge_scale(self, scaling: torch.Tensor | None = None) -> float | torch.Tensor:
        """The factor on B @ A: a number, or a scalar on the device where it is trained.

        Args:
            scaling: value of the trained scaling, where the layer's own is not whole here.
        """
        if self.scaling is None:
            return self.scale
        scaling = self.scaling.detach() if scaling is None else scaling
        return torch.tanh(scaling).float().squeeze()

    def extra_repr(self) -> str:
        return f"{self.spec.in_features} -> {self.spec.out_features}, r={self.rank}"


def draw_factors(
    layer: AdapterLinear, config: AdapterConfig, seed: int, event: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh factors A (r, n) and B (m, r), fp32 on the layer's device: the part that methods
    see of them.

    `kaiming`: A uniform on +-1/sqrt(n), B zero (LoRA; kaiming_uniform with a = sqrt(5)).
    `balanced`: both uniform with the standard deviations of SwitchLoRA, which give the product
    (1/r) B A x a third of the variance of x.

    Args:
        event: 0 at the start, then the number of the restart.
    """
    rows, cols = layer.spec.out_features, layer.spec.in_features
    device = layer.lora_A.device

    def uniform(factor: str, parameter: nn.Parameter, bound: float) -> torch.Tensor:
        if not bound:
            return torch.zeros(method_shape(parameter), device=device)
        shape, shard = global_shape(parameter), shard_of(parameter)
        stream = Stream(seed, factor, layer.spec.name, event)
        draw = draw_uniform(stream, 0, shape.numel(), device).view(shape)
        draw = draw.mul_(2.0).sub_(1.0).mul_(bound)
        return draw if shard is None or shard.inner else shard.part(draw)

    bound_a, bound_b = factor_bounds(config, rows, cols)
    return uniform("lora_A", layer.lora_A, bound_a), uniform("lora_B", layer.lora_B, bound_b)


def factor_bounds(config: AdapterConfig, rows: int, cols: int) -> tuple[float, float]:
    """Elements of A and B are drawn uniform on plus or minus these.

    Args:
        rows: height m of the projection's weight.
        cols: its width n.
    """
    if config.init == "kaiming":
        return 1.0 / math.sqrt(cols), 0.0
    gain = 1.0 / math.sqrt(3.0)  # leaky_relu with a = sqrt(5)
    std_a = (math.sqrt(rows) * config.rank / cols**1.5) ** 0.25 * math.sqrt(gain)
    std_b = (config.rank / math.sqrt(rows * cols)) ** 0.25 * math.sqrt(gain)
    return math.sqrt(3.0) * std_a, math.sqrt(3.0) * std_b


def adapter_layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """The projections of a model of which all are `AdapterLinear`s, by full name, in order."""
    layers = {}
    for name, layer in projection_layers(model).items():
        assert isinstance(layer, AdapterLinear)
        layers[name] = layer
    return layers


AdapterT = TypeVar("AdapterT", bound=AdapterConfig)


class AdapterMethod(Method[AdapterT]):
    """A method whose projections are `AdapterLinear`s."""

    def linear(self, spec: LinearSpec) -> Projection:
        return AdapterLinear(spec, self.config)

    def initialize(self, layer: Projection, dense: torch.Tensor) -> None:
        assert isinstance(layer, AdapterLinear)
        drawn = draw_factors(layer, self.config, self.seed, event=0)
        # rounded first, so that W absorbs exactly what the forward pass will compute with
        lora_a, lora_b = (factor.to(self.dtype).float() for factor in drawn)
        layer.lora_A.copy_(lora_a)
        layer.lora_B.copy_(lora_b)
        if layer.scaling is not None:
            layer.scaling.fill_(1.0)
        layer.weight.copy_(dense)
        if self.config.init != "kaiming":  # where B is zero nothing is to be absorbed
            # the wrapped projection computes what the dense weight did
            layer.weight.sub_(layer.merge_scale() * (lora_b @ lora_a))

    def dense_weight(self, layer: Projection) -> torch.Tensor:
        assert isinstance(layer, AdapterLinear)
        product = layer.lora_B.float() @ layer.lora_A.float()
        return layer.weight.float() + layer.merge_scale() * product

    def parts(self, layer: Projection) -> dict[str, torch.Tensor]:
        """The frozen weight, with all merges so far, and the live adapter."""
        own = self.adapter(layer)
        return {"weight": own.base, "adapter": own.scale * own.lora_b @ own.lora_a}

    def matrix_optimizer(
        self, settings: OptimizerConfig, name: str, parameter: nn.Parameter
    ) -> MatrixOptimizer | None:
        return pair_rule(settings, name, self.config.scale)

    def adapter(self, layer: Projection) -> Adapter:
        assert isinstance(layer, AdapterLinear)
        lora_b = layer.lora_B.float()
        if layer.scaling is not None:  # of each projection; the fixed scale is 1
            lora_b = lora_b * layer.merge_scale()
        return Adapter(layer.weight.float(), layer.lora_A.float(), lora_b, layer.scale)


def refuse_lost_edits(kind: str, edits: Mapping[str, WeightEdit], dtype: torch.dtype) -> None:
    """Make sure that edits which were meant to change weights changed them.

    Args:
        kind: of the event.
        edits: whole projections by name.
        dtype: what the model computes in.

    Raises:
        DivergenceError: no element of a weight changed.
    """
    lost = [name for name, e in edits.items() if e.intended_sq > 0.0 and not e.elements]
    if not lost:
        return
    remedy = "raise optimizer.adapter_lr, or let more updates pass between events"
    if dtype != torch.float32:
        remedy = f"where train.base_precision is bf16 write bf16_residual; otherwise {remedy}"
    raise DivergenceError(
        f"the {kind} changed no element of {lost[0]}.weight ({len(lost)} of {len(edits)} "
        "projections): the change is below half a unit in the last place of the stored weight, as "
        f"the adapters have hardly moved; {remedy}"
    )
