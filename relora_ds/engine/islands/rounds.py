"""Rounds of islands: several updates apart, then an outer step that makes their weights common.

At the end of a round every island g has moved the common weights theta by -delta_g = theta_g -
theta. With DELTA the mean of all delta_g, and V = mu V + DELTA, the common weights become theta -
lr DELTA, theta - lr V, or with Nesterov theta - lr (DELTA + mu V), on every island the same bits.
Adam's moments stay with the island.

With fewer than 32 bits an island sends the code q_g of e_g = e_g + delta_g instead and keeps e_g -
q_g for its next round; DELTA is the mean of the decoded q_g, which every island adds up in the same
order.

What is trained may travel in fragments, in turn, and while training goes on. A fragment that left
when an island had theta_g arrives when it has theta_g', and the island goes on from theta +
(theta_g' - theta_g), theta being the common weights after the outer step: what it learnt meanwhile
is kept, and is part of the delta that it sends next. Where all weights have to be common, whatever
is on its way arrives, and then everything is exchanged at once.

Each rank works on its own slices of the masters: the common weights and V are on the host, and what
it exchanges is as large as its slices are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from relora_ds.accounting.recorder import recorder
from relora_ds.activity import doing
from relora_ds.config.spread.islands import IslandsConfig
from relora_ds.engine.islands.flights import Flight, landed, packed
from relora_ds.engine.islands.pieces import Fragment, Piece, everything, fragments
from relora_ds.engine.islands.products import MeanProducts
from relora_ds.engine.zero.layout import Layout
from relora_ds.methods.interface import Product
from relora_ds.methods.train_state import Weights
from relora_ds.numerics.codes.wire_codes import decode, encode
from relora_ds.parallel.islands import Awaited, Islands


class Rounds:
    """The rounds of one engine.

    Args:
        layout: where masters and working weights are.
        weights: gathers and edits whole weights within an island.
        islands: who meets.
        config: when they meet, what they send, and what is done with the mean.
        names: full name of every parameter.
    """

    def __init__(
        self,
        layout: Layout,
        weights: Weights,
        islands: Islands,
        config: IslandsConfig,
        names: Mapping[nn.Parameter, str],
    ) -> None:
        self._layout, self._islands, self._config = layout, islands, config
        self._outer, self._transport = config.outer, config.transport
        self._products = MeanProducts(layout, weights, islands)
        self._device = next(iter(layout.placements)).device
        self._everything = everything(layout)
        self._fragments = fragments(layout, names, config.transport.fragments)
        self._flights: list[Flight] = []
        self._anchors: list[torch.Tensor] | None = None
        self.waited = 0.0
        """Seconds that this process's host has waited for other islands."""
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
        """Whether islands have the same weights: no round is under way. They share gradients in
        an update that begins so."""
        return self._anchors is None

    @torch.no_grad()
    def begin(self, done: int) -> None:
        """Remember the weights, where they are common and the run's rounds have begun, or let the
        fragments leave whose turn it is; call before every update.

        They leave here, not at the end of the update before, so that nothing that all processes do
        together at the end of a round waits behind them.

        Args:
            done: updates of the run.
        """
        if self._anchors is None:
            if done >= self._config.from_step:
                self._anchors = [_on_host(owner) for owner in self._layout.owners()]
            return
        with recorder.phase("step"), doing("departure of a fragment"):
            for number in self._config.leaving(done):
                if self._transport.overlap:
                    self._flights.append(self._leave(number, done))
                else:
                    self._meet(self._fragments[number])

    @torch.no_grad()
    def end(self, done: int, products: Sequence[Product], common: bool) -> None:
        """Do what is due after an update. A collective call of all islands.

        Args:
            done: updates of the run.
            products: of factors that are about to be merged, whose mean over the islands shall be
                exact: see `MeanProducts`. Weights are made common for them.
            common: whether weights have to be common, at the end of a round.
        """
        ends = self._config.ends_at(done)
        if self._anchors is None:
            return
        if ends and (common or products or self._config.ends_together(done)):
            with recorder.phase("step"), doing("end of a round"):
                self._make_common(products)
        elif self._flights and self._flights[0].left + self._transport.overlap <= done:
            with recorder.phase("step"), doing("arrival of a fragment"):
                self._land(done - self._transport.overlap)

    def settle(self) -> None:
        """Wait for what is on its way, which is not going to be used. A collective call."""
        for flight in self._flights:
            self._arrived(flight)
        self._flights = []

    def _make_common(self, products: Sequence[Product]) -> None:
        self._land()
        kept = self._products.before(products)
        self._meet(self._everything)
        self._anchors = None
        self._products.absorb(products, kept)

    def _meet(self, fragment: Fragment) -> None:
        """Exchange a fragment, and wait for it."""
        anchors, masters = self._anchors, self._masters()
        assert anchors is not None
        for piece in fragment.pieces:
            mean = self._mean(self._change(piece, masters), piece)
            common = self._outer_step(piece, mean)
            piece.put(masters, common)
            piece.put(anchors, common)
        self._take_masters(fragment)

    def _leave(self, number: int, done: int) -> Flight:
        """Begin to exchange a fragment."""
        masters, sent, awaited = self._masters(), list[torch.Tensor](), list[Awaited]()
        for piece in self._fragments[number].pieces:
            sent.append(_on_host(piece.take(masters)))
            change, bits = self._change(piece, masters), self._transport.bits
            if bits == 32:
                awaited.append(self._islands.begin_sum(change.cpu()))
            else:
                awaited.append(self._islands.begin_gather(self._coded(change, piece).cpu()))
        return Flight(number, done, sent, awaited)

    def _land(self, left: int | None = None) -> None:
        """Take the outer step for fragments that left after so many updates or fewer; by default
        for all."""
        anchors, masters = self._anchors, self._masters()
        assert anchors is not None
        while self._flights and (left is None or self._flights[0].left <= left):
            flight = self._flights.pop(0)
            fragment = self._fragments[flight.number]
            for piece, sent, mean in zip(
                fragment.pieces, flight.sent, self._arrived(flight), strict=True
            ):
                common = self._outer_step(piece, mean.to(self._device))
                learnt = self._values(piece, masters).sub_(sent.to(self._device))
                piece.put(anchors, common)
                piece.put(masters, learnt.add_(common))
            self._take_masters(fragment)

    def _arrived(self, flight: Flight) -> list[torch.Tensor]:
        """The means over islands of a fragment's pieces; waits for them."""
        if flight.awaited:
            with self._waiting():
                results = [each.result() for each in flight.awaited]
            flight.awaited, bits, size = [], self._transport.bits, self._islands.size
            flight.means = [
                result.div(size) if bits == 32 else self._decoded(result, sent.numel())
                for result, sent in zip(results, flight.sent, strict=True)
            ]
        return flight.means

    def _change(self, piece: Piece, masters: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the island has moved the common weights by, (N,) fp32 of its own."""
        assert self._anchors is not None
        return piece.take(self._anchors).to(self._device) - self._values(piece, masters)

    def _outer_step(self, piece: Piece, mean: torch.Tensor) -> torch.Tensor:
        """The common weights behind it, (N,) fp32 of their own; `mean` is used up."""
        assert self._anchors is not None
        outer = self._outer
        if self.momentum:
            moved = piece.take(self.momentum).to(self._device).mul_(outer.momentum).add_(mean)
            piece.put(self.momentum, moved)
            mean = mean.add_(moved, alpha=outer.momentum) if outer.nesterov else moved
        return piece.take(self._anchors).to(self._device).sub(mean, alpha=outer.lr)

    def _mean(self, change: torch.Tensor, piece: Piece) -> torch.Tensor:
        """The mean over islands of their changes, which are used up, (N,) fp32."""
        if self._transport.bits == 32:
            with self._waiting():
                return self._islands.mean(change)
        code = self._coded(change, piece)
        with self._waiting():
            codes = self._islands.gather(code)
        return self._decoded(codes, change.numel())

    def _coded(self, change: torch.Tensor, piece: Piece) -> torch.Tensor:
        """What travels of a change, which is used up; what that leaves out is kept."""
        bits = self._transport.bits
        if not self.residual:
            return encode(change, bits)
        change.add_(piece.take(self.residual).to(self._device))
        code = encode(change, bits)
        piece.put(self.residual, change.sub_(decode(code, change.numel(), bits)))
        return code

    def _decoded(self, codes: torch.Tensor, count: int) -> torch.Tensor:
        """The mean of every island's code, (count,) fp32 on their device."""
        total = torch.zeros(count, device=codes.device)
        for code in codes:
            total.add_(decode(code, count, self._transport.bits))
        return total.div_(self._islands.size)

    def kept_of(self, owner: torch.Tensor) -> list[torch.Tensor]:
        """Momentum and residual of a tensor that the optimizer steps, where there are any; live.

        Neither means anything for what a method draws anew.
        """
        number = next(n for n, each in enumerate(self._layout.owners()) if each is owner)
        return [kept[number] for kept in (self.momentum, self.residual) if kept]

    def _masters(self) -> list[torch.Tensor]:
        """All tensors that the optimizer steps on this rank, live and 1-D."""
        return [owner.detach().view(-1) for owner in self._layout.owners()]

    def _values(self, piece: Piece, masters: Sequence[torch.Tensor]) -> torch.Tensor:
        """What masters hold now, (N,) fp32 of its own."""
        return piece.take(masters).to(self._device, torch.float32, copy=True)

    def _take_masters(self, fragment: Fragment) -> None:
        for parameter in fragment.parameters:
            self._layout.take_masters(parameter)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - started

    def state(self) -> dict[str, torch.Tensor]:
        """What the round that is under way has beside weights, momentum and residual; waits for
        what is on its way.

        Returns:
            Copies on the host by name; none where weights are common. `anchor.N` are the common
            weights and `master.N` the island's own, by owner; `sent.N` and `mean.N` what fragments
            on their way were made of and have come to, and `left` (fragments,) int64 when they
            left, or -1.
        """
        if self._anchors is None:
            return {}
        found = numbered("anchor", [anchor.clone() for anchor in self._anchors]) | self.masters()
        if self._flights:
            for flight in self._flights:
                self._arrived(flight)
            found |= packed(self._flights, self._fragments, self._anchors)
        return found

    def masters(self) -> dict[str, torch.Tensor]:
        """The island's own weights as they are in `state`."""
        return numbered("master", [_on_host(master) for master in self._masters()])

    def forms(self, flying: bool) -> dict[str, torch.Tensor]:
        """Tensors without memory in the form of `state`, with fragments on their way or without."""
        sizes = [torch.empty(master.numel(), device="meta") for master in self._masters()]
        kinds = ("anchor", "master", "sent", "mean") if flying else ("anchor", "master")
        found = {name: form for kind in kinds for name, form in numbered(kind, sizes).items()}
        left = torch.empty(len(self._fragments), dtype=torch.int64, device="meta")
        return found | ({"left": left} if flying else {})

    @torch.no_grad()
    def go_on(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore `state`. A collective call of an island."""
        for number, master in enumerate(self._masters()):
            master.copy_(state[f"master.{number}"])
        self._anchors = [state[f"anchor.{n}"].clone() for n in range(len(self._masters()))]
        self._flights = landed(state, self._fragments) if "left" in state else []
        self._take_masters(self._everything)


def start_rounds(
    layout: Layout,
    weights: Weights,
    islands: Islands,
    config: IslandsConfig,
    model: nn.Module,
) -> Rounds | None:
    """The rounds of an engine; None where islands share gradients, or there is but one."""
    if islands.size == 1 or config.share_gradients:
        return None
    names = {parameter: name for name, parameter in model.named_parameters()}
    return Rounds(layout, weights, islands, config, names)


def numbered(name: str, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by owner under the names that checkpoints give them."""
    return {f"{name}.{number}": tensor for number, tensor in enumerate(tensors)}


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).to("cpu", torch.float32, copy=True)
