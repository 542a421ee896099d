"""The exact mean of products that islands have trained the factors of.

The mean of the islands' products s_g B_g A_g is not the product of the mean factors: what lies
between them is the covariance of B and A over the islands. It is of rank (G + 1) r at most, so that
a frozen weight W beside the factors takes it up where it lies: islands exchange their factors,
never W or anything of its size, and each rank edits its own slice. With common factors B, A and
scale s afterwards, W + s B A is W plus the mean of the products, to the rounding of one fp32 edit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from relora_ds.engine.zero.layout import Layout
from relora_ds.methods.interface import Product
from relora_ds.methods.train_state import Weights
from relora_ds.parallel.islands import Islands

Slices = dict[nn.Parameter, torch.Tensor]
"""This rank's slice of each factor's master, 1-D; may be empty."""


class MeanProducts:
    """Edits of frozen weights by what the mean of factors leaves out.

    Args:
        layout: where masters and working weights are.
        weights: gathers and edits whole weights within an island.
        islands: who meets.
    """

    def __init__(self, layout: Layout, weights: Weights, islands: Islands) -> None:
        self._layout, self._weights, self._islands = layout, weights, islands

    def before(self, products: Sequence[Product]) -> Slices:
        """This island's factors, to be kept until its masters are the common ones."""
        return {
            factor: self._layout.placements[factor].master().clone()
            for product in products
            for factor in product.factors
        }

    def absorb(self, products: Sequence[Product], kept: Slices) -> None:
        """Edit the frozen weights. A collective call, after working weights are the common ones.

        Args:
            products: the same on every island.
            kept: what `before` returned.
        """
        for product in products:
            self._absorb(product, kept)

    def _absorb(self, product: Product, kept: Slices) -> None:
        common = {p: self._layout.placements[p].master().clone() for p in product.factors}
        own = torch.cat([kept[p].to(p.device) for p in product.factors])
        sizes = [kept[p].numel() for p in product.factors]
        lefts, rights = [], []
        for flat in self._islands.gather(own):
            self._set(dict(zip(product.factors, flat.split(sizes), strict=True)))
            left, right = self._scaled(product)
            lefts.append(left / self._islands.size)
            rights.append(right)
        self._set(common)
        left, right = self._scaled(product)
        stacked = torch.cat([*lefts, -left], dim=1), torch.cat([*rights, right])
        self._weights.add_product(product.weight, *stacked, 1.0, measured=False)

    def _scaled(self, product: Product) -> tuple[torch.Tensor, torch.Tensor]:
        """s B and A as the model computes with them now, fp32 copies."""
        left, right, *scaling = self._weights.gather(list(product.factors))
        scale = product.scale(*scaling)
        return left.to(torch.float32, copy=True).mul_(scale), right.to(torch.float32, copy=True)

    def _set(self, slices: Slices) -> None:
        for parameter, values in slices.items():
            self._layout.placements[parameter].master().copy_(values)
            self._layout.take_masters(parameter)
