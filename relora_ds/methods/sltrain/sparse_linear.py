"""The projection scale * B @ A + S with a sparse S, and its gradients, without a dense weight.

Shapes: x (T, n), A (r, n), B (m, r), S (m, n) with trained values (nnz,) at fixed positions,
y (T, m). The dense W = scale * B @ A + S is composed for a matrix product and dropped again.
SLTrain, arXiv 2406.02214, section 3; the forms and their costs are derived anew.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from relora_ds.methods.formulation.composed import Composition, Gradients
from relora_ds.methods.sltrain.support import flat_positions
from relora_ds.numerics.gpu import launch
from relora_ds.numerics.transfers import orderless_writes

# said once per process by torch; only the sampled product is used of it
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def compose(
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    values: torch.Tensor,
    row_starts: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """scale * B @ A + S, (m, n) in the factors' dtype; S may have fewer rows and columns."""
    rows, cols = lora_b.shape[0], lora_a.shape[1]
    weight = lora_b.new_empty(rows, cols)
    # the scale is part of the product's epilogue: one rounding, no second pass
    torch.addmm(weight, lora_b, lora_a, beta=0, alpha=scale, out=weight)
    add_at(weight, row_starts, columns, values)
    return weight


def add_at(
    dense: torch.Tensor, row_starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> None:
    """dense (m, n), contiguous, += S, in place; each sum is rounded once."""
    if _has_kernel(dense):
        from relora_ds.numerics.gpu import support as kernels  # needs Triton

        return kernels.add_at(dense, row_starts, columns, values)
    positions = flat_positions(row_starts, columns, dense.shape[1])
    with orderless_writes():
        dense.view(-1).index_add_(0, positions, values)


def read_at(dense: torch.Tensor, row_starts: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Elements (nnz,) of dense (m, n) where S has its own."""
    if _has_kernel(dense):
        from relora_ds.numerics.gpu import support as kernels  # needs Triton

        return kernels.read_at(dense, row_starts, columns)
    return dense.view(-1).index_select(0, flat_positions(row_starts, columns, dense.shape[1]))


def _has_kernel(dense: torch.Tensor) -> bool:
    return dense.dtype in (torch.float32, torch.bfloat16) and launch.usable(dense.device)


@dataclass(frozen=True)
class SparseComposition(Composition):
    """W = scale * B @ A + S; beside the factors are `values`, `row_starts` and `columns`."""

    def compose(
        self, lora_a: torch.Tensor, lora_b: torch.Tensor, *rest: torch.Tensor
    ) -> torch.Tensor:
        return compose(lora_a, lora_b, *rest, scale=self.scale)

    def of_dense(self, full: torch.Tensor, *rest: torch.Tensor) -> Gradients:
        _, row_starts, columns = rest
        return read_at(full, row_starts, columns), None, None

    def of_rows(self, rows: torch.Tensor, grad: torch.Tensor, *rest: torch.Tensor) -> Gradients:
        """dv[k] = sum over tokens of dy[:, i_k] * x[:, j_k]."""
        _, row_starts, columns = rest
        grad = grad[:, : row_starts.numel() - 1]
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
        return sampled.values().to(rows.dtype), None, None
