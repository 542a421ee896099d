"""SwitchLoRA in plain single-process PyTorch, written from the paper and nothing of the engine.

Vectors are switched one by one, pools are whole matrices, Adam keeps a counter per vector and
gradients of frozen vectors are set to zero after clipping. Only the model's skeleton, the plain
adapter and the counter-based draws are shared with the product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.config.methods.switchlora import SwitchLoRAConfig
from relora_ds.model.llama import Llama
from relora_ds.randomness import Stream
from tests.harness.reference import PlainAdapter


def uniform(seed: int, purpose: str, name: str, shape: Sequence[int], std: float) -> torch.Tensor:
    """Zero mean, standard deviation `std`."""
    draw = Stream(seed, purpose, name).uniform(0, math.prod(shape)).view(*shape)
    return (draw * 2 - 1) * (math.sqrt(3) * std)


class Side:
    """One factor of one layer: its pool, who is active, who is frozen, and Adam's state."""

    def __init__(self, factor: nn.Parameter, axis: int, pool: torch.Tensor, rank: int) -> None:
        self.factor, self.axis, self.pool, self.rank = factor, axis, pool, rank
        self.slots = list(range(len(pool) - rank, len(pool)))
        self.frozen = [0] * rank
        self.steps = torch.zeros((rank, 1) if axis == 0 else (1, rank))
        self.m, self.v = torch.zeros_like(factor), torch.zeros_like(factor)
        self.turns: list[int] = []
        self.round = 0

    def vector(self, tensor: torch.Tensor, index: int) -> torch.Tensor:
        """Row or column `index`, a live view."""
        return tensor.select(self.axis, index)

    def forget(self, index: int, freeze: int) -> None:
        for tensor in (self.m, self.v, self.steps):
            self.vector(tensor, index).zero_()
        self.frozen[index] = freeze


class Layer:
    """The switches of one projection."""

    def __init__(self, linear: PlainAdapter, config: SwitchLoRAConfig, seed: int) -> None:
        self.linear, self.config, self.seed = linear, config, seed
        self.name = linear.spec.name
        (m, n), r = linear.weight.shape, config.rank
        gain = 1 / math.sqrt(3)
        std_a = (math.sqrt(m) * r / n**1.5) ** 0.25 * math.sqrt(gain)
        std_b = (r / math.sqrt(m * n)) ** 0.25 * math.sqrt(gain)
        dense = linear.weight.detach().clone()
        linear.lora_A.data.copy_(uniform(seed, "lora_A", self.name, (r, n), std_a))
        linear.lora_B.data.copy_(uniform(seed, "lora_B", self.name, (m, r), std_b))
        linear.weight.data.copy_(dense - linear.scale * linear.lora_B.data @ linear.lora_A.data)
        count = min(m, n)
        pool_a = uniform(seed, "candidate_A", self.name, (count, n), std_a)
        pool_b = uniform(seed, "candidate_B", self.name, (count, m), std_b)
        self.a, self.b = Side(linear.lora_A, 0, pool_a, r), Side(linear.lora_B, 1, pool_b, r)

    def next_slot(self, side: Side, label: str, taken: list[int]) -> int:
        """The next candidate in the round's order that is not in use."""
        while True:
            if not side.turns:
                count = len(side.pool) - (side.rank if side.round == 0 else 0)
                stream = Stream(self.seed, f"switch.candidates_{label}", self.name, side.round)
                side.turns = stream.permutation(count)(np.arange(count)).tolist()
                side.round += 1
            slot = side.turns.pop(0)
            if slot not in side.slots and slot not in taken:
                return slot

    def switch(self, step: int, count: int) -> int:
        words = Stream(self.seed, "switch.vectors", self.name, step).words(0, self.config.rank)
        order = sorted(range(self.config.rank), key=lambda i: int(words[i]))
        free = [i for i in order if not self.a.frozen[i] and not self.b.frozen[i]]
        count = min(count, len(free) // 2, len(self.a.pool) - self.config.rank)
        rows, cols = free[:count], free[count : 2 * count]
        for side, other, indices, label in (
            (self.a, self.b, rows, "A"),
            (self.b, self.a, cols, "B"),
        ):
            taken: list[int] = []
            for _ in indices:
                taken.append(self.next_slot(side, label, taken))
            for index, slot in zip(indices, taken, strict=True):
                self.replace(side, other, index, slot)
        return 2 * count

    def replace(self, side: Side, other: Side, index: int, slot: int) -> None:
        weight, scale = self.linear.weight.data, self.linear.scale
        current = side.vector(side.factor.data, index)
        old, new = current.clone(), side.pool[slot].clone()
        kept = other.vector(other.factor.data, index)
        if side is self.a:
            weight += scale * torch.outer(kept, old - new)
        else:
            weight += scale * torch.outer(old - new, kept)
        side.pool[side.slots[index]] = old
        current.copy_(new)
        side.slots[index] = slot
        other.forget(index, self.config.freeze_steps)

    def freeze(self) -> None:
        """Zero gradients of frozen vectors, and count the update."""
        for side in (self.a, self.b):
            assert side.factor.grad is not None
            for index, left in enumerate(side.frozen):
                if left:
                    side.vector(side.factor.grad, index).zero_()

    def thaw(self) -> None:
        for side in (self.a, self.b):
            side.frozen = [max(0, left - 1) for left in side.frozen]


@dataclass
class PlainSwitchLoRA:
    """The training loop on one global batch per step, constant learning rates."""

    model: Llama
    config: SwitchLoRAConfig
    seed: int
    steps: int
    lrs: dict[str, float]
    clip: float
    eps: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    norms: list[float] = field(default_factory=list)
    switched: int = 0
    state: dict[nn.Parameter, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        adapters = [m for m in self.model.modules() if isinstance(m, PlainAdapter)]
        self.layers = [Layer(linear, self.config, self.seed) for linear in adapters]

    def train(self, batches: list[torch.Tensor]) -> list[float]:
        """One update per global batch of tokens (G, S + 1)."""
        losses = []
        for step, tokens in enumerate(batches):
            if step:
                self.event(step)
            losses.append(self.update(tokens))
        return losses

    def update(self, tokens: torch.Tensor) -> float:
        """One update from tokens (G, S + 1); returns the loss."""
        sides = {id(s.factor): s for layer in self.layers for s in (layer.a, layer.b)}
        self.model.zero_grad()
        logits = self.model.logits(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.norms.append(float(nn.utils.clip_grad_norm_(trained, self.clip)))
        with torch.no_grad():
            for layer in self.layers:
                layer.freeze()
            for parameter in trained:
                if id(parameter) in sides:
                    self.update_factor(sides[id(parameter)])
                else:
                    self.update_dense(parameter)
            for layer in self.layers:
                layer.thaw()
        return loss.item()

    @torch.no_grad()
    def event(self, step: int, updates: int = 1) -> None:
        """Switch what is due in the last so many of `step` updates."""
        config = self.config
        expected = 0.0
        for each in range(step - updates + 1, step + 1):
            rate = max(0.3 ** ((each + 1) / (config.descent_rate * self.steps)), 1e-8)
            expected += config.rank * rate / config.interval
        chance = Stream(self.seed, "switch.count", event=step).uniform(0, len(self.layers))
        for layer, value in zip(self.layers, chance.tolist(), strict=True):
            up = value < expected - math.floor(expected)
            self.switched += layer.switch(step, math.floor(expected) + up)

    def update_factor(self, side: Side) -> None:
        grad, (b1, b2) = side.factor.grad, self.betas
        assert grad is not None
        side.steps += 1
        side.m = b1 * side.m + (1 - b1) * grad
        side.v = b2 * side.v + (1 - b2) * grad**2
        first = side.m / (1 - b1 ** side.steps.double()).float()
        second = side.v / (1 - b2 ** side.steps.double()).float()
        decay = torch.full_like(side.steps, 1 - self.lrs["adapter"] * self.weight_decay)
        for index, left in enumerate(side.frozen):
            if left:
                side.vector(decay, index).fill_(1.0)
        side.factor.mul_(decay)
        side.factor.sub_(self.lrs["adapter"] * first / (second.sqrt() + self.eps))

    def update_dense(self, parameter: nn.Parameter) -> None:
        grad, (b1, b2) = parameter.grad, self.betas
        assert grad is not None
        zero = torch.zeros_like(parameter)
        m, v, step = self.state.get(parameter, [zero, zero, torch.zeros((), dtype=torch.float64)])
        m, v, step = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2, step + 1
        self.state[parameter] = [m, v, step]
        if parameter.ndim > 1:
            parameter.mul_(1 - self.lrs["dense"] * self.weight_decay)
        first, second = m / (1 - b1 ** float(step)), v / (1 - b2 ** float(step))
        parameter.sub_(self.lrs["dense"] * first / (second.sqrt() + self.eps))
