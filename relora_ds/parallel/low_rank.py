"""What projections made of two factors have in common: how tensor parallelism cuts the factors.

Shapes: W (m, n), A (r, n), B (m, r), x (T, n). The side of a factor that it has in common with W is
cut as W is. The factor that has nothing in common with the side that is cut, A of a `column` and B
of a `row` projection, is cut along the inner dimension r (plan `act`) or whole on every rank
(`fold`). With `act` every rank forms its part of x A^T: a column projection joins the parts on the
way forward and divides the sum of their gradients on the way back, a row projection the other way
round, which moves as many bytes as summing a (T, r) tensor once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from relora_ds.parallel.linear import LinearSpec, Projection
from relora_ds.parallel.tensor import TensorFunction, exchange

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class InnerExchange:
    """What happens to (..., r) tensors between the two factors of a projection.

    Args:
        forward: of x A^T, on its way to B.
        backward: of the gradient behind B, on its way to A.
    """

    forward: TensorFunction
    backward: TensorFunction

    def __call__(self, inner: torch.Tensor) -> torch.Tensor:
        """The exchange as a step that autograd follows."""
        return exchange(inner, self.forward, self.backward)


class LowRankProjection(Projection):
    """A projection with trained factors `lora_A` (r, n) and `lora_B` (m, r)."""

    def __init__(self, spec: LinearSpec, rank: int) -> None:
        super().__init__(spec)
        self.rank = rank
        self.lora_A = nn.Parameter(torch.empty(rank, spec.in_features))
        self.lora_B = nn.Parameter(torch.empty(spec.out_features, rank))

    @property
    def shards_inner(self) -> bool:
        """Whether one of the factors is cut along r."""
        return self.spec.tp.shards_inner(self.rank)

    @property
    def inner_factor(self) -> tuple[str, int]:
        """Name of the factor that W's cut leaves alone, and which of its dimensions is r."""
        return ("lora_A", 0) if self.spec.style == "column" else ("lora_B", 1)

    def shard_dims(self) -> dict[str, int]:
        return {"lora_B": 0} if self.spec.style == "column" else {"lora_A": 1}

    def inner_dims(self) -> dict[str, int]:
        return dict([self.inner_factor]) if self.shards_inner else {}

    def partial_gradients(self) -> list[nn.Parameter]:
        partial = super().partial_gradients()
        if self.spec.tp.size > 1 and not self.shards_inner:
            partial.append(getattr(self, self.inner_factor[0]))
        return partial

    def inner_exchange(self) -> InnerExchange:
        """The exchange of (T, r) tensors; this rank has parts (T, r / N) where a factor is sharded
        along r."""
        if not self.shards_inner:
            return InnerExchange(_as_it_is, _as_it_is)
        tp = self.spec.tp
        join, divide = partial(tp.join, dim=-1), partial(tp.divide, dim=-1)
        return InnerExchange(*((join, divide) if self.spec.style == "column" else (divide, join)))

    def join_factors(self, lora_a: torch.Tensor, lora_b: torch.Tensor) -> Factors:
        """Both factors whole along r: (r, n) and (m, r), of which the rank may hold a part of n or
        of m."""
        if not self.shards_inner:
            return lora_a, lora_b
        if self.spec.style == "column":
            return self.spec.tp.join(lora_a, 0), lora_b
        return lora_a, self.spec.tp.join(lora_b, 1)

    def divide_factors(self, lora_a: torch.Tensor, lora_b: torch.Tensor) -> Factors:
        """This rank's parts of sums over the ranks: what `join_factors` makes of gradients."""
        if not self.shards_inner:
            return lora_a, lora_b
        if self.spec.style == "column":
            return self.spec.tp.divide(lora_a, 0), lora_b
        return lora_a, self.spec.tp.divide(lora_b, 1)


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x
