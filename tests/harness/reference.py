"""ReLoRA in plain single-process PyTorch, written from the paper and nothing of the engine.

Textbook AdamW with one step count per parameter, dense autograd, torch's own clipping and quantile.
Only the model's skeleton and the counter-based draws are shared with the product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.config.methods.relora import ReLoRAConfig
from relora_ds.model.llama import Llama
from relora_ds.parallel.linear import LinearSpec, Projection
from relora_ds.randomness import Stream


class PlainAdapter(Projection):
    """W x + s B A x by ordinary autograd."""

    def __init__(self, spec: LinearSpec, rank: int, scale: float) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(
            torch.empty(spec.out_features, spec.in_features), requires_grad=False
        )
        self.lora_A = nn.Parameter(torch.empty(rank, spec.in_features))
        self.lora_B = nn.Parameter(torch.empty(spec.out_features, rank))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low_rank = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight) + self.scale * low_rank

    def draw(self, seed: int, event: int) -> None:
        """A uniform on +-1/sqrt(n), B zero."""
        rank, cols = self.lora_A.shape
        uniform = Stream(seed, "lora_A", self.spec.name, event).uniform(0, rank * cols)
        self.lora_A.data.copy_((uniform.view(rank, cols) * 2 - 1) / math.sqrt(cols))
        self.lora_B.data.zero_()


@dataclass
class PlainState:
    """Moments of a parameter, and the updates since they were reset."""

    m: torch.Tensor
    v: torch.Tensor
    step: int = 0


@dataclass
class PlainAdamW:
    """The textbook update."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    state: dict[nn.Parameter, PlainState] = field(default_factory=dict)

    def update(self, parameter: nn.Parameter, lr: float) -> None:
        assert parameter.grad is not None
        zero = torch.zeros_like(parameter)
        state = self.state.setdefault(parameter, PlainState(zero.clone(), zero.clone()))
        b1, b2 = self.betas
        state.step += 1
        state.m = b1 * state.m + (1 - b1) * parameter.grad
        state.v = b2 * state.v + (1 - b2) * parameter.grad**2
        first = state.m / (1 - b1**state.step)
        second = state.v / (1 - b2**state.step)
        if parameter.ndim > 1:
            parameter.data.mul_(1 - lr * self.weight_decay)
        parameter.data.sub_(lr * first / (second.sqrt() + self.eps))


@dataclass
class PlainReLoRA:
    """The training loop of ReLoRA on one global batch per step."""

    model: Llama
    config: ReLoRAConfig
    seed: int
    steps: int
    lrs: dict[str, float]
    clip: float
    warmup: int
    optimizer: PlainAdamW
    norms: list[float] = field(default_factory=list)

    def factor(self, step: int) -> float:
        """Jagged cosine of the paper, minimum ratio 0.1."""
        every, ramp = self.config.merge_every, self.config.restart_warmup_steps

        def cosine(at: int) -> float:
            progress = min(1.0, (at - self.warmup) / (self.steps - self.warmup))
            return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2

        if step < self.warmup:
            return step / self.warmup
        cycle, position = divmod(step, every)
        if cycle and position < ramp:
            return position / ramp * cosine(cycle * every + ramp)
        return cosine(step)

    def train(self, batches: list[torch.Tensor]) -> list[float]:
        """One update per global batch of tokens (G, S + 1)."""
        losses = []
        for done, tokens in enumerate(batches, start=1):
            self.model.zero_grad()
            logits = self.model.logits(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            norm = nn.utils.clip_grad_norm_([p for _, p in trained], self.clip)
            self.norms.append(float(norm))
            factor = self.factor(done - 1)
            for name, parameter in trained:
                role = "adapter" if "_proj" in name else "dense"
                self.optimizer.update(parameter, factor * self.lrs[role])
            if done % self.config.merge_every == 0 and done < self.steps:
                self.restart(done // self.config.merge_every)
            losses.append(float(loss))
        return losses

    @torch.no_grad()
    def restart(self, number: int) -> None:
        for layer in self.model.modules():
            if not isinstance(layer, PlainAdapter):
                continue
            layer.weight.add_(layer.scale * layer.lora_B @ layer.lora_A)
            layer.draw(self.seed, number)
            for factor in ("lora_A", "lora_B"):
                self.reset(getattr(layer, factor), f"{layer.spec.name}.{factor}", number)

    def reset(self, parameter: nn.Parameter, name: str, number: int) -> None:
        state, reset = self.optimizer.state[parameter], self.config.reset
        keep = {}
        for key, moment, values in (("m", "exp_avg", state.m), ("v", "exp_avg_sq", state.v)):
            if reset.mode == "zero":
                keep[key] = torch.zeros_like(parameter, dtype=torch.bool)
            elif reset.mode == "random":
                stream = Stream(self.seed, f"reset.{moment}", name, number)
                uniform = stream.uniform(0, parameter.numel()).view_as(parameter)
                keep[key] = uniform > reset.fraction
            else:
                size = values.abs()
                keep[key] = size > torch.quantile(size.flatten(), reset.fraction)
        if reset.joint:
            both = keep["m"] & keep["v"] if reset.mode == "magnitude" else keep["m"]
            keep = {"m": both, "v": both}
        state.m, state.v = state.m * keep["m"], state.v * keep["v"]
        if reset.steps:
            state.step = 0
