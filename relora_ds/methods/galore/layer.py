"""A projection whose weight moves within a subspace of rank r.

Shapes: x (T, n), W (m, n); the subspace lies along one side of W, of length S, and L is the other
one. The weight in effect is W + P Q where that is the right side, S = n, and W + (P Q)^T where it
is the left one, S = m. The `projected` P (L, r) is trained, the `basis` Q (r, S) is fixed. The
gradient of P is G Q^T, or G^T Q^T, for the gradient G of W: training P is
GaLore between two choices of the basis, and no gradient larger than P is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from relora_ds.numerics.padding import cut, padded
from relora_ds.numerics.products import gradient, matmul, place_of
from relora_ds.parallel.linear import LinearSpec, Projection

Sink = Callable[[torch.Tensor], None]
"""Takes a dense gradient of this rank's part of W, of the part's shape."""


class _ProjectedProduct(torch.autograd.Function):
    """y = x W^T plus what P Q adds, saving x alone.

    The parameters themselves are saved, not views of them: what ZeRO stage 3 gathers for the
    forward pass is not kept until the backward pass. Where x or y is wider than the weight, copies
    with zeros take the places of all three in products, and gradients are cut.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        projected: torch.Tensor,
        basis: torch.Tensor,
        right: bool,
        sink: Sink | None,
        width: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, projected, basis)
        ctx.right, ctx.sink, ctx.place = right, sink, place_of(projected)
        rows = x.reshape(-1, x.shape[-1])
        out = matmul(rows, padded(weight, width, rows.shape[1]).t())
        projected, basis = _padded(projected, basis, width, rows.shape[1], right)
        if right:
            out.addmm_(matmul(rows, basis.t()), projected.t())
        else:
            out.addmm_(matmul(rows, projected), basis)
        return out.view(*x.shape[:-1], width)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, projected, basis = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        if ctx.sink is not None:
            ctx.sink(cut(matmul(grad.t(), rows), *weight.shape))
        shape, width = projected.shape, grad.shape[1]
        projected, basis = _padded(projected, basis, width, rows.shape[1], ctx.right)
        inner = matmul(grad, projected if ctx.right else basis.t())
        grad_x = grad_projected = None
        if ctx.needs_input_grad[0]:
            behind = basis if ctx.right else projected.t()
            grad_x = matmul(grad, padded(weight, width, rows.shape[1]))
            grad_x = grad_x.addmm_(inner, behind).view_as(x)
        if ctx.needs_input_grad[2]:
            factors = (grad, matmul(rows, basis.t())) if ctx.right else (rows, inner)
            grad_projected = gradient(factors[0].t(), factors[1], shape, ctx.place)
        return grad_x, None, grad_projected, None, None, None, None


def _padded(
    projected: torch.Tensor, basis: torch.Tensor, outputs: int, inputs: int, right: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """P and Q for an output and an input of these widths."""
    other, along = (outputs, inputs) if right else (inputs, outputs)
    rank = basis.shape[0]
    return padded(projected, other, rank), padded(basis, rank, along)


class GaLoreLinear(Projection):
    """A frozen `weight` (m, n), a frozen `basis` (r, S) and the trained `projected` (L, r).

    Args:
        spec: of the projection.
        rank: r, at most min(m, n).
        right: whether the subspace lies along n, so that S = n and L = m, or along m.

    Over tensor-parallel ranks the two small matrices are cut along the side that they have in
    common with what is cut of the weight; the one without such a side is whole on every rank.
    """

    def __init__(self, spec: LinearSpec, rank: int, right: bool) -> None:
        super().__init__(spec)
        self.rank, self.right = rank, right
        m, n = spec.out_features, spec.in_features
        other, along = (m, n) if right else (n, m)
        self.weight = nn.Parameter(torch.empty(m, n), requires_grad=False)
        self.basis = nn.Parameter(torch.empty(rank, along), requires_grad=False)
        self.projected = nn.Parameter(torch.empty(other, rank))
        self.bias = self.allocate_bias()
        self.sink: Sink | None = None
        """Given the dense gradient of every backward pass whose forward pass it was set in."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        width = self.output_width(self.weight.shape[0])
        out = _ProjectedProduct.apply(
            x, self.weight, self.projected, self.basis, self.right, self.sink, width
        )
        assert isinstance(out, torch.Tensor)
        return out

    @property
    def _cuts_projected(self) -> bool:
        return (self.spec.style == "column") == self.right

    def shard_dims(self) -> dict[str, int]:
        weight = {"weight": 0 if self.spec.style == "column" else 1}
        return weight | ({"projected": 0} if self._cuts_projected else {"basis": 1})

    def partial_gradients(self) -> list[nn.Parameter]:
        partial = super().partial_gradients()
        if self.spec.tp.size > 1 and not self._cuts_projected:
            partial.append(self.projected)
        return partial

    def factors(
        self, projected: torch.Tensor, basis: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What P and Q add to the weight, as the two factors (m, r) and (r, n) of a product."""
        return (projected, basis) if self.right else (basis.t(), projected.t())

    def extra_repr(self) -> str:
        return f"{self.spec.in_features} -> {self.spec.out_features}, r={self.rank}"
