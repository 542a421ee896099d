"""Frozen weights that make up for an exchange of vectors of their factors.

Shapes: W (m, n), A (r, n), B (m, r). W + scale * B @ A stays what it is if, for every row i of A
that is replaced, scale * B[:, i] (old - new) is added to W, and for every column j of B likewise
scale * (old - new) A[j].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from relora_ds.numerics.base_weight import (
    BaseWeight,
    ProductReport,
    add_product,
    apply_product,
)
from relora_ds.numerics.gpu import launch

_MEASURED = 16  # weights that are measured at once, which bounds what is remembered of them


@dataclass(frozen=True)
class Exchange:
    """The vectors of an exchange of k rows of A and k columns of B, in the working precision."""

    a: torch.Tensor
    """(2k, n), contiguous: rows of A, first those that are replaced."""
    b: torch.Tensor
    """(2k, m), contiguous: columns of B at the same indices; the latter half is replaced."""
    new_a: torch.Tensor
    """(k, n), contiguous: what the first half of `a` is replaced by."""
    new_b: torch.Tensor
    """(k, m), contiguous: what the second half of `b` is replaced by."""
    scale: float

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """left (m, 2k) and right (2k, n), fp32: W is to take up scale * left @ right.

        Differences in fp32 of what the forward pass computes with: W then absorbs them exactly.
        """
        old_a, kept_a = self.a.chunk(2)
        kept_b, old_b = self.b.chunk(2)
        left = torch.cat([kept_b.float(), old_b.float() - self.new_b.float()]).t()
        return left, torch.cat([old_a.float() - self.new_a.float(), kept_a.float()])


@dataclass(frozen=True)
class WeightSlice:
    """What a process holds of a frozen weight."""

    base: BaseWeight
    """Store of the slice."""
    working: torch.Tensor
    """Elements [start, start + n) of the flattened working weight, a live 1-D view."""
    start: int


def absorb(
    edits: Sequence[tuple[WeightSlice, Exchange]], measured: bool
) -> list[torch.Tensor] | None:
    """Let weights make up for exchanges, each of its slice. The host does not wait.

    Args:
        edits: slices of weights on one device, with the exchange of the whole weight's factors.
        measured: whether to check the results, which costs several passes over the weights;
            without, an edit is a single pass.

    Returns:
        The fields of a `WeightEdit` for each, (5,), float64. None if `measured` is false.
    """
    if not edits or not launch.usable(edits[0][0].working.device):
        edit = add_product if measured else apply_product
        sums = [
            edit(part.base, part.working, part.start, *exchange.factors(), exchange.scale)
            for part, exchange in edits
        ]
        return [each for each in sums if each is not None] if measured else None
    at_once = _MEASURED if measured else len(edits)
    found: list[torch.Tensor] = []
    for first in range(0, len(edits), at_once):
        found += _absorb_on_gpu(edits[first : first + at_once], measured)
    return found if measured else None


def _absorb_on_gpu(
    edits: Sequence[tuple[WeightSlice, Exchange]], measured: bool
) -> list[torch.Tensor]:
    from relora_ds.numerics.gpu import exchange as kernels  # needs Triton

    reports = [
        ProductReport(part.base, part.working, part.start, *exchange.factors(), exchange.scale)
        for part, exchange in (edits if measured else ())
    ]
    kernels.absorb([(part.base, part.working, part.start, exchange) for part, exchange in edits])
    return [report.sums() for report in reports]
