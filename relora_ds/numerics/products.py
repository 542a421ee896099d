"""Products of matrices by the faster of two libraries, and where gradients are written.

torch takes MKL for fp32 on every processor. On some, oneDNN, which torch carries as well and takes
for bf16, is faster. Which one computes depends on the processor, the dtype and the shapes alone, so
that a run repeats itself bit for bit.

An engine that keeps gradients in tensors of its own may offer their places. A backward pass then
writes a gradient where it will be read, instead of into memory that is copied and dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from relora_ds.numerics.host.processor import prefers_onednn
from relora_ds.numerics.padding import padded

_ONEDNN_FROM = 1 << 24
"""Multiplications from which the longer way into oneDNN pays."""

Place = Callable[[], torch.Tensor | None]
"""Gives a new view of where a parameter's gradient goes, of the parameter's shape, once for each
gradient; None where what is there already has to stay."""


def offer_place(parameter: nn.Parameter, place: Place | None) -> None:
    """Have gradients of `parameter` written there, or nowhere in particular again."""
    parameter.gradient_place = place  # pyright: ignore[reportAttributeAccessIssue]


def place_of(tensor: torch.Tensor) -> Place | None:
    """Where the gradient of a parameter goes; None for a tensor of which nobody has said so."""
    return getattr(tensor, "gradient_place", None)


def matmul(left: torch.Tensor, right: torch.Tensor, place: Place | None = None) -> torch.Tensor:
    """left (p, q) @ right (q, s), outside of autograd; contiguous.

    Args:
        left: of any strides.
        right: dtype and device of `left`.
        place: where the product goes if it is the gradient of a parameter.
    """
    out = None if place is None else place()
    if out is not None:
        return torch.mm(left, right, out=out)
    if not _by_onednn(left, left.shape[0] * right.numel()):
        return left @ right
    if left.stride(-1) == 1:
        return _onednn(left, right.t())
    # oneDNN rearranges a transposed first factor, which pays where that is the smaller one by far
    if 2 * left.shape[0] <= right.shape[1]:
        return _onednn(left, right.t())
    if 2 * right.shape[1] <= left.shape[0]:
        return _onednn(right.t(), left).t().contiguous()
    return left @ right


def gradient(
    left: torch.Tensor, right: torch.Tensor, shape: torch.Size, place: Place | None = None
) -> torch.Tensor:
    """left (p, q) @ right (q, s), outside of autograd, without what padding added to it.

    Args:
        left: of any strides.
        right: dtype and device of `left`.
        shape: of the parameter that it is the gradient of; p and s, or less.
        place: where it goes.
    """
    if (left.shape[0], right.shape[1]) == shape:
        return matmul(left, right, place)
    part = matmul(left, right)[: shape[0], : shape[1]]
    out = None if place is None else place()
    return part.contiguous() if out is None else out.copy_(part)


def scaled(product: torch.Tensor, factor: float, place: Place | None = None) -> torch.Tensor:
    """product * factor, which takes the memory of `product`.

    Args:
        product: that nobody else uses.
        factor: any number.
        place: where the result goes if it is the gradient of a parameter.
    """
    out = None if place is None else place()
    return product.mul_(factor) if out is None else torch.mul(product, factor, out=out)


def linear(x: torch.Tensor, weight: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """x W^T with gradients for both, (..., m).

    Args:
        x: (..., n), or wider: what is behind n is padding.
        weight: (m, n), dtype and device of `x`.
        width: of the result, which is filled up with zeros; m by default.
    """
    width = weight.shape[0] if width is None else width
    fits = weight.shape == (width, x.shape[-1])
    if fits and place_of(weight) is None and not _by_onednn(x, x.numel() * width):
        return F.linear(x, weight)
    out = _Linear.apply(x, weight, width)
    assert isinstance(out, torch.Tensor)
    return out


class _Linear(torch.autograd.Function):
    """x W^T, saving x and W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, width: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = place_of(weight)
        rows = x.reshape(-1, x.shape[-1])
        whole = padded(weight, width, x.shape[-1])
        return matmul(rows, whole.t()).view(*x.shape[:-1], width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            whole = padded(weight, grad.shape[1], rows.shape[1])
            grad_x = matmul(grad, whole).view_as(x)
            del whole  # before dW takes as much again
        if ctx.needs_input_grad[1]:
            grad_weight = gradient(grad.t(), rows, weight.shape, ctx.place)
        return grad_x, grad_weight, None


def _by_onednn(tensor: torch.Tensor, multiplications: int) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and multiplications >= _ONEDNN_FROM
        and prefers_onednn()
    )


def _onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (p, q) @ weight (s, q)^T, contiguous."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
