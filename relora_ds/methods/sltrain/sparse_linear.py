"""The projection scale * B @ A + S with a sparse S, and its gradients, without a dense weight.

Shapes: x (T, n), A (r, n), B (m, r), S (m, n) with trained values (nnz,) at fixed positions,
y (T, m). The dense W = scale * B @ A + S is composed for a matrix product and dropped again.
SLTrain, arXiv 2406.02214, section 3; the forms and their costs are derived anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from relora_ds.methods.sltrain.support import flat_positions
from relora_ds.numerics.indexing import orderless_writes
from relora_ds.parallel.low_rank import Factors

# said once per process by torch; only the sampled product is used of it
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

GradientForm = Literal["auto", "dense", "low_rank"]

# Rate of the sampled product relative to a dense one, transposes included. CPU, fp32: measured,
# 1 thread, 512^2 to 1024^2, T = 2048. CPU, bf16: there is no kernel. CUDA: upper bound from the
# rate of gathers out of L2, not measured; at the usual densities the dense form wins there.
_SAMPLED_RATE = {
    ("cpu", torch.float32): 0.04,
    ("cpu", torch.float64): 0.04,
    ("cuda", torch.float32): 0.007,
    ("cuda", torch.float64): 0.007,
}


def _as_they_are(lora_a: torch.Tensor, lora_b: torch.Tensor) -> Factors:
    return lora_a, lora_b


@dataclass(frozen=True)
class SparseForm:
    """How one projection is computed.

    Args:
        scale: factor on B @ A.
        gradient: `dense` forms G = dy^T x (m, n) for a moment, `low_rank` never does; `auto`
            takes the one with fewer operations.
        keep: hold W from the forward to the backward pass. Where the forward pass is run again in
            the backward pass, this is for a moment only, and W is composed once there, not twice.
        join: makes whole factors of the parts that are passed in, for a moment.
        divide: makes gradients of the parts of those of the whole factors.
    """

    scale: float
    gradient: GradientForm
    keep: bool
    join: Callable[[torch.Tensor, torch.Tensor], Factors] = _as_they_are
    divide: Callable[[torch.Tensor, torch.Tensor], Factors] = _as_they_are


def compose(
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    values: torch.Tensor,
    row_starts: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """scale * B @ A + S, (m, n) in the factors' dtype."""
    rows, cols = lora_b.shape[0], lora_a.shape[1]
    weight = lora_b.new_empty(rows, cols)
    # the scale is part of the product's epilogue: one rounding, no second pass
    torch.addmm(weight, lora_b, lora_a, beta=0, alpha=scale, out=weight)
    positions = flat_positions(row_starts, columns, cols)
    with orderless_writes():
        weight.view(-1).index_add_(0, positions, values)
    return weight


def prefers_low_rank(
    tokens: int, shape: tuple[int, int], rank: int, count: int, rate: float
) -> bool:
    """Whether factor gradients and a sampled product cost less than G and a gather.

    Dense: 2 T m n + 4 m n r. Low rank: 4 T r (m + n) + 2 T nnz / rate.

    Args:
        shape: (m, n).
        count: nnz.
        rate: of the sampled product relative to a dense one.
    """
    rows, cols = shape
    saved = 1.0 + 2.0 * rank / tokens - 2.0 * rank * (rows + cols) / (rows * cols)
    return count / (rows * cols) < rate * saved


class SparseLowRankProduct(torch.autograd.Function):
    """y = x W^T with W = scale * B @ A + S, saving x, the factors and the positions.

    `apply(x, A, B, values, row_starts, columns, composed, form)`: `composed` is W if somebody keeps
    it, otherwise None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        values: torch.Tensor,
        row_starts: torch.Tensor,
        columns: torch.Tensor,
        composed: torch.Tensor | None,
        form: SparseForm,
    ) -> torch.Tensor:
        parts, weight = (lora_a, lora_b, values, row_starts, columns), composed
        if weight is None:
            weight = compose(*form.join(lora_a, lora_b), *parts[2:], form.scale)
        kept = (weight,) if form.keep or composed is not None else ()
        # parameters as they are, nothing derived from them: ZeRO may swap their storage in between
        ctx.save_for_backward(x, *parts, *kept)
        ctx.form = form
        return (x.reshape(-1, x.shape[-1]) @ weight.t()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        form: SparseForm = ctx.form
        x, lora_a, lora_b, values, row_starts, columns, *kept = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        lora_a, lora_b = form.join(lora_a, lora_b)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight = (
                kept[0]
                if kept
                else compose(lora_a, lora_b, values, row_starts, columns, form.scale)
            )
            grad_x = (grad @ weight).view_as(x)
            del weight, kept  # before G takes as much again
        if not any(ctx.needs_input_grad[1:4]):
            return grad_x, *(None,) * 7
        gradients = _low_rank if _takes_low_rank(form, rows, lora_b, columns) else _dense
        *factors, of_values = gradients(rows, grad, lora_a, lora_b, row_starts, columns, form.scale)
        return grad_x, *form.divide(*factors), of_values, *(None,) * 4


def _takes_low_rank(
    form: SparseForm, rows: torch.Tensor, lora_b: torch.Tensor, columns: torch.Tensor
) -> bool:
    if form.gradient != "auto":
        return form.gradient == "low_rank"
    rate = _SAMPLED_RATE.get((rows.device.type, rows.dtype), 0.0)
    shape, rank = (lora_b.shape[0], rows.shape[1]), lora_b.shape[1]
    return prefers_low_rank(rows.shape[0], shape, rank, columns.numel(), rate)


def _dense(
    rows: torch.Tensor,
    grad: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    row_starts: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of A, B and the values from G = dy^T x."""
    full = grad.t() @ rows
    grad_a = (lora_b.t() @ full).mul_(scale)
    grad_b = (full @ lora_a.t()).mul_(scale)
    positions = flat_positions(row_starts, columns, rows.shape[1])
    return grad_a, grad_b, full.view(-1).index_select(0, positions)


def _low_rank(
    rows: torch.Tensor,
    grad: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    row_starts: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of the values without the dense one.

    dv[k] = sum over tokens of dy[:, i_k] * x[:, j_k].
    """
    grad_a = (grad @ lora_b).mul_(scale).t() @ rows
    grad_b = (grad.t() @ (rows @ lora_a.t())).mul_(scale)
    # the kernel knows fp32 and fp64 only, and wants both operands' tokens to be contiguous
    kind = torch.float64 if rows.dtype == torch.float64 else torch.float32
    pattern = torch.sparse_csr_tensor(
        row_starts,
        columns.to(torch.int32),
        torch.zeros(columns.numel(), dtype=kind, device=rows.device),
        (grad.shape[1], rows.shape[1]),
        check_invariants=False,
    )
    left = grad.t().to(kind).contiguous()
    sampled = torch.sparse.sampled_addmm(pattern, left, rows.to(kind), beta=0.0)
    return grad_a, grad_b, sampled.values().to(rows.dtype)
