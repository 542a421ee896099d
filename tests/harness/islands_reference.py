"""Islands in plain single-process PyTorch: one whole model each, whole parameters, and an outer
step in fp64, written from the algorithm and nothing of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.model.llama import Llama
from tests.harness.reference import PlainAdamW, PlainAdapter
from tests.harness.switchlora_reference import PlainSwitchLoRA

Values = dict[str, torch.Tensor]


@dataclass
class PlainIsland:
    """One island: a model and what trains it."""

    model: Llama
    optimizer: PlainAdamW
    clip: float

    def trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def train(self, tokens: torch.Tensor, rates: Mapping[str, float]) -> float:
        """One update from its share (G, S + 1) of the global batch; returns the loss."""
        self.model.zero_grad()
        logits = self.model.logits(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.trained().values()), self.clip)
        for name, parameter in self.trained().items():
            role = "adapter" if "_proj" in name else "dense"
            self.optimizer.update(parameter, rates[role])
        return float(loss)

    def values(self, names: Sequence[str]) -> Values:
        """Copies in fp64."""
        trained = self.trained()
        return {name: trained[name].detach().double() for name in names}


@dataclass
class PlainSwitchingIsland(PlainIsland):
    """One island under SwitchLoRA.

    Args:
        plain: trains the model, and switches its vectors.
    """

    plain: PlainSwitchLoRA

    def train(self, tokens: torch.Tensor, rates: Mapping[str, float]) -> float:
        self.plain.lrs = dict(rates)
        return self.plain.update(tokens)

    def switch(self, done: int, updates: int) -> dict[str, list[int]]:
        """What is due after so many updates, for the last `updates` of them; returns the indices
        of pairs that are new, by layer."""
        layers = self.plain.layers
        before = [[*zip(layer.a.slots, layer.b.slots, strict=True)] for layer in layers]
        self.plain.event(done, updates)
        found = {}
        for layer, slots in zip(layers, before, strict=True):
            now = zip(layer.a.slots, layer.b.slots, strict=True)
            found[layer.name] = [n for n, pair in enumerate(now) if pair != slots[n]]
        return found


@dataclass
class PlainIslands:
    """Islands that train apart.

    Args:
        islands: all of them, with the same weights.
        every: updates of a round.
        overlap: updates between leaving and arriving.
        fragments: names of the parameters of each.
        outer: `lr`, `momentum` and Nesterov's step.
        seed: of the run.
        first_turn: updates before any fragment leaves by itself.
    """

    islands: Sequence[PlainIsland]
    every: int
    overlap: int
    fragments: list[list[str]]
    outer: tuple[float, float, bool]
    seed: int
    first_turn: int = 0
    common: Values | None = None
    momentum: Values = field(default_factory=dict)
    on_their_way: list[tuple[int, list[str], list[Values]]] = field(default_factory=list)
    merges: int = 0

    def step(
        self,
        done: int,
        tokens: Sequence[torch.Tensor],
        rates: Mapping[str, float],
        together: bool,
        merge: bool,
    ) -> float:
        """The update after `done` ones, and what islands do after it; returns the mean loss."""
        everything = list(self.islands[0].trained())
        if self.common is None:
            self.common = self.islands[0].values(everything)
        elif done >= self.first_turn:
            for number, names in enumerate(self.fragments):
                if (done - number * self.every // len(self.fragments)) % self.every == 0:
                    sent = [island.values(names) for island in self.islands]
                    self.on_their_way.append((done, names, sent))
        if not self.overlap:
            self.land(done)
        both = zip(self.islands, tokens, strict=True)
        losses = [island.train(share, rates) for island, share in both]
        self.land(done + 1 if together or merge else done + 1 - self.overlap)
        if together or merge:
            products = self.products() if merge else {}
            sent = [island.values(everything) for island in self.islands]
            self.arrive(everything, sent)
            self.common = None
            if merge:
                self.merge(products)
        return sum(losses) / len(losses)

    def switch(self, done: int, updates: int) -> None:
        """Replace vectors of common factors; the outer momentum of new pairs starts afresh."""
        for island in self.islands:
            assert isinstance(island, PlainSwitchingIsland)
            for name, pairs in island.switch(done, updates).items():
                self.momentum[f"{name}.lora_A"][pairs] = 0
                self.momentum[f"{name}.lora_B"][:, pairs] = 0

    def land(self, left: int) -> None:
        """Let everything arrive that left after so many updates or fewer."""
        while self.on_their_way and self.on_their_way[0][0] <= left:
            self.arrive(*self.on_their_way.pop(0)[1:])

    @torch.no_grad()
    def arrive(self, names: Sequence[str], sent: Sequence[Values]) -> None:
        """The outer step with what islands sent; what each learnt since is kept."""
        lr, decay, nesterov = self.outer
        for name in names:
            start = self.common[name] if self.common else sent[0][name]
            mean = torch.stack([start - values[name] for values in sent]).mean(0)
            moved = decay * self.momentum.get(name, torch.zeros_like(mean)) + mean
            self.momentum[name] = moved
            common = start - lr * (mean + decay * moved if nesterov else moved)
            if self.common is not None:
                self.common[name] = common
            for island, values in zip(self.islands, sent, strict=True):
                parameter = island.trained()[name]
                parameter.copy_(common + (parameter.double() - values[name]))

    def products(self) -> Values:
        """Mean over islands of every adapted projection, by name, fp64."""
        found: Values = {}
        for island in self.islands:
            for layer in _adapters(island.model):
                factors = layer.lora_B.detach().double(), layer.lora_A.detach().double()
                dense = layer.weight.double() + layer.scale * factors[0] @ factors[1]
                found[layer.spec.name] = found.get(layer.spec.name, 0) + dense / len(self.islands)
        return found

    @torch.no_grad()
    def merge(self, products: Values) -> None:
        """ReLoRA's: the weight takes up the mean, factors and their moments begin anew."""
        self.merges += 1
        for island in self.islands:
            for layer in _adapters(island.model):
                layer.weight.copy_(products[layer.spec.name])
                layer.draw(self.seed, self.merges)
                for factor in ("lora_A", "lora_B"):
                    island.optimizer.state.pop(getattr(layer, factor), None)
                    self.momentum.pop(f"{layer.spec.name}.{factor}", None)


def _adapters(model: nn.Module) -> list[PlainAdapter]:
    return [module for module in model.modules() if isinstance(module, PlainAdapter)]
