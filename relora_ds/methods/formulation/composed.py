"""y = x W_eff^T with a dense W_eff that is composed of factors and more, and their gradients.

Shapes: x (T, n), A (r, n), B (m, r), W_eff (m, n), y (T, m). Saved are x and what W_eff is made of,
or W_eff itself where it outlives the product. Nothing of x's size is kept beside x. Where x or y is
wider than the factors, W_eff is composed at their widths, with zeros, and gradients are cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from relora_ds.methods.formulation.choice import GradientForm
from relora_ds.numerics.padding import cut, padded
from relora_ds.numerics.products import matmul, place_of, scaled
from relora_ds.parallel.low_rank import Factors

Gradients = tuple[torch.Tensor | None, ...]


def _as_they_are(lora_a: torch.Tensor, lora_b: torch.Tensor) -> Factors:
    return lora_a, lora_b


@dataclass(frozen=True)
class Composition(ABC):
    """What W_eff is made of beside the factors, and how one projection is computed.

    Args:
        scale: factor on B @ A.
        gradient: `dense` forms dW = dy^T x (m, n) for a moment, `low_rank` never does.
        keep: hold W_eff from the forward to the backward pass. Where the forward pass is run again
            in the backward pass, this is for a moment only, and W_eff is composed once there.
        join: makes whole factors of the parts that are passed in, for a moment.
        divide: makes gradients of the parts of those of the whole factors.
        width: columns of y, m or more; m if None.
    """

    scale: float
    gradient: GradientForm
    keep: bool = False
    join: Callable[[torch.Tensor, torch.Tensor], Factors] = _as_they_are
    divide: Callable[[torch.Tensor, torch.Tensor], Factors] = _as_they_are
    width: int | None = None

    def factors(self, x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> Factors:
        """Whole factors at the widths of x and y, of the parts that are held here."""
        lora_a, lora_b = self.join(lora_a, lora_b)
        width = lora_b.shape[0] if self.width is None else self.width
        lora_a = padded(lora_a, lora_a.shape[0], x.shape[-1])
        return lora_a, padded(lora_b, width, lora_b.shape[1])

    @abstractmethod
    def compose(
        self, lora_a: torch.Tensor, lora_b: torch.Tensor, *rest: torch.Tensor
    ) -> torch.Tensor:
        """W_eff of what `factors` returns; `rest` is what the projection is made of beside them."""

    @abstractmethod
    def of_dense(self, full: torch.Tensor, *rest: torch.Tensor) -> Gradients:
        """Gradients of `rest` from dW, of the shape of W_eff."""

    @abstractmethod
    def of_rows(self, rows: torch.Tensor, grad: torch.Tensor, *rest: torch.Tensor) -> Gradients:
        """Gradients of `rest` from x and dy, without dW."""


class ComposedProduct(torch.autograd.Function):
    """`apply(x, composed, composition, A, B, *rest)`; `composed` is W_eff if somebody keeps it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        composed: torch.Tensor | None,
        composition: Composition,
        *parts: torch.Tensor,
    ) -> torch.Tensor:
        weight = composed
        if weight is None:
            weight = composition.compose(*composition.factors(x, *parts[:2]), *parts[2:])
        kept = (weight,) if composition.keep or composed is not None else ()
        # parameters as they are, nothing derived from them: ZeRO may swap their storage in between
        ctx.save_for_backward(x, *parts, *kept)
        ctx.composition, ctx.parts = composition, len(parts)
        ctx.places = place_of(parts[0]), place_of(parts[1])
        rows = x.reshape(-1, x.shape[-1])
        return matmul(rows, weight.t()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Gradients:  # pyright: ignore[reportIncompatibleMethodOverride]
        composition: Composition = ctx.composition
        x, *tensors = ctx.saved_tensors
        (lora_a, lora_b, *rest), kept = tensors[: ctx.parts], tensors[ctx.parts :]
        rows = x.reshape(-1, x.shape[-1])
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        inputs, outputs = lora_a.shape[1], lora_b.shape[0]
        lora_a, lora_b = composition.factors(x, lora_a, lora_b)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight = kept[0] if kept else composition.compose(lora_a, lora_b, *rest)
            grad_x = matmul(grad, weight).view_as(x)
            del weight, kept, tensors  # before dW takes as much again
        needed = ctx.needs_input_grad[3:]
        if not any(needed):
            return grad_x, None, None, *(None,) * len(needed)
        if composition.gradient == "low_rank":
            grad_a = matmul(matmul(grad, lora_b).t(), rows)
            grad_b = matmul(grad.t(), matmul(rows, lora_a.t()))
            others = composition.of_rows(rows, grad, *rest)
        else:
            full = matmul(grad.t(), rows)
            grad_a = matmul(lora_b.t(), full)
            grad_b = matmul(full, lora_a.t())
            others = composition.of_dense(full, *rest)
        grad_a = cut(grad_a, grad_a.shape[0], inputs)
        grad_b = cut(grad_b, outputs, grad_b.shape[1])
        factors = (
            scaled(each, composition.scale, place)
            for each, place in zip(composition.divide(grad_a, grad_b), ctx.places, strict=True)
        )
        return grad_x, None, None, *factors, *others
