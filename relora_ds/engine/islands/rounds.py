"""Rounds of islands: several updates apart, then one outer step that makes their weights common.

At the end of a round every island g has moved the common weights theta by -delta_g = theta_g -
theta. With DELTA the mean of all delta_g, and V = mu V + DELTA, the common weights become theta -
lr DELTA, theta - lr V, or with Nesterov theta - lr (DELTA + mu V), on every island the same bits.
Adam's moments stay with the island.

With fewer than 32 bits an island sends the code q_g of e_g = e_g + delta_g instead and keeps e_g -
q_g for its next round; DELTA is the mean of the decoded q_g, which every island adds up in the same
order.

Each rank works on its own slices of the masters: the values at the start of a round and V are on
the host, and what it exchanges is as large as its slices are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from relora_ds.config.spread.islands import IslandsConfig
from relora_ds.engine.islands.products import MeanProducts
from relora_ds.engine.zero.layout import Layout
from relora_ds.methods.interface import Product
from relora_ds.methods.train_state import Weights
from relora_ds.numerics.codes.wire_codes import BLOCK, decode, encode
from relora_ds.parallel.islands import Islands

_STRETCH = 1 << 24
"""Elements that are on their way at a time; it bounds what a round's end adds on the device."""
assert _STRETCH % BLOCK == 0, "codes of stretches are the code of the whole"


class Rounds:
    """The rounds of one engine.

    Args:
        layout: where masters and working weights are.
        weights: gathers and edits whole weights within an island.
        islands: who meets.
        config: what they send, and what is done with the mean.
    """

    def __init__(
        self, layout: Layout, weights: Weights, islands: Islands, config: IslandsConfig
    ) -> None:
        self._layout, self._islands = layout, islands
        self._every, self._outer, self._transport = config.every, config.outer, config.transport
        self._products = MeanProducts(layout, weights, islands)
        self._device = next(iter(layout.placements)).device
        self._anchors: list[torch.Tensor] | None = None
        self.momentum: list[torch.Tensor] = []
        """V by owner in their order, fp32 on the host, 1-D; empty without momentum. The same for
        ranks with the same place in their islands."""
        if config.outer.momentum:
            self.momentum = [_on_host(owner).zero_() for owner in layout.owners()]
        self.residual: list[torch.Tensor] = []
        """e by owner in the same form, of this island alone; empty without error feedback."""
        if config.transport.bits < 32 and config.transport.error_feedback:
            self.residual = [_on_host(owner).zero_() for owner in layout.owners()]

    @property
    def common(self) -> bool:
        """Whether islands have the same weights: no round is under way."""
        return self._anchors is None

    def ends_at(self, done: int) -> bool:
        """Whether a round is over after so many updates of the run."""
        return done % self._every == 0

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the weights as they are, if a round begins; call before every update."""
        if self._anchors is None:
            self._anchors = [_on_host(owner) for owner in self._layout.owners()]

    @torch.no_grad()
    def end(self, products: Sequence[Product]) -> None:
        """Make the weights of all islands common. A collective call of all of them.

        Args:
            products: of factors, whose mean over the islands shall be exact: see `MeanProducts`.
        """
        assert self._anchors is not None, "a round ends after it began"
        kept = self._products.before(products)
        for number, owner in enumerate(self._layout.owners()):
            self._step(number, owner.detach().view(-1))
        self._anchors = None
        for parameter in self._layout.placements:
            self._layout.take_masters(parameter)
        self._products.absorb(products, kept)
        self._forget(products)

    def _step(self, number: int, flat: torch.Tensor) -> None:
        """The outer step of one tensor that the optimizer steps on this rank."""
        assert self._anchors is not None
        outer = self._outer
        for first in range(0, flat.numel(), _STRETCH):
            part = slice(first, first + _STRETCH)
            start = self._anchors[number][part].to(self._device)
            change = start - flat[part].to(self._device, torch.float32)
            mean = self._mean(change, self.residual[number][part] if self.residual else None)
            if self.momentum:
                kept = self.momentum[number][part]
                moved = kept.to(self._device).mul_(outer.momentum).add_(mean)
                kept.copy_(moved)
                mean = mean.add_(moved, alpha=outer.momentum) if outer.nesterov else moved
            flat[part].copy_(start.sub_(mean, alpha=outer.lr))

    def _mean(self, change: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """The mean over islands of their changes, (N,) fp32; `residual` takes what is left out."""
        bits, count = self._transport.bits, change.numel()
        if bits == 32:
            return self._islands.mean(change)
        if residual is not None:
            change.add_(residual.to(self._device))
        code = encode(change, bits)
        if residual is not None:
            residual.copy_(change.sub_(decode(code, count, bits)))
        total = torch.zeros(count, device=self._device)
        for other in self._islands.gather(code):
            total.add_(decode(other, count, bits))
        return total.div_(self._islands.size)

    def _forget(self, products: Sequence[Product]) -> None:
        """Let neither momentum nor residual point to factors that are about to be drawn anew."""
        number = {id(owner): n for n, owner in enumerate(self._layout.owners())}
        for product in products:
            for factor in product.factors:
                placement = self._layout.placements[factor]
                for kept in (self.momentum, self.residual):
                    if kept:
                        placement.stretch.of(kept[number[id(placement.owner)]]).zero_()


def start_rounds(
    layout: Layout, weights: Weights, islands: Islands, config: IslandsConfig
) -> Rounds | None:
    """The rounds of an engine; None where islands share gradients, or there is but one."""
    if islands.size == 1 or config.share_gradients:
        return None
    return Rounds(layout, weights, islands, config)


def _on_host(owner: torch.Tensor) -> torch.Tensor:
    return owner.detach().view(-1).to("cpu", torch.float32, copy=True)
