"""SLTrain on the engine at every stage, beside plain autograd with dense weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.methods.sltrain.support import draw_support, flat_positions, support_size
from relora_ds.model.init import InitialWeights
from relora_ds.model.llama import Llama
from relora_ds.parallel.linear import LinearSpec, Projection
from relora_ds.parallel.topology import Topology
from relora_ds.randomness import Stream
from tests.harness.build import STAGES, TINY, Training, batches, run_config, spread
from tests.harness.reference import PlainAdamW
from tests.harness.runs import RATES

STEPS = 8
RANK, SPARSITY, SCALE = 3, 0.1, 2.0
EPS, CLIP, DECAY = 1e-3, 0.3, 0.1
VARIANTS: dict[str, dict[str, Any]] = {
    "layer": {"gradient": "dense"},
    "step": {"keep_composed": "step", "gradient": "low_rank"},
    "checkpointed": {"gradient": "auto"},
}


class PlainSparse(Projection):
    """scale * B @ A + S, dense, by ordinary autograd."""

    def __init__(self, spec: LinearSpec, seed: int) -> None:
        super().__init__(spec)
        rows, cols = spec.out_features, spec.in_features
        count = support_size(rows, cols, SPARSITY)
        self.lora_B = nn.Parameter(torch.zeros(rows, RANK))
        self.lora_A = nn.Parameter(self._draw(seed, "lora_A", RANK * cols).view(RANK, cols))
        self.values = nn.Parameter(self._draw(seed, "values", count))
        positions = flat_positions(*draw_support(seed, spec.name, rows, cols, count), cols)
        self.mask = torch.zeros(rows * cols, dtype=torch.bool)
        self.mask[positions.long()] = True

    def _draw(self, seed: int, purpose: str, count: int) -> torch.Tensor:
        uniform = Stream(seed, purpose, self.spec.name).uniform(0, count)
        return (uniform * 2 - 1) / math.sqrt(self.spec.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = SCALE * self.lora_B @ self.lora_A
        sparse = torch.zeros(product.numel()).masked_scatter(self.mask, self.values)
        return F.linear(x, product + sparse.view_as(product))


def described(precision: str, variant: str) -> RunConfig:
    """A run of eight steps, clipped at every one."""
    method = {"name": "sltrain", "rank": RANK, "scale": SCALE, "sparsity": SPARSITY}
    return run_config(
        method | VARIANTS[variant],
        train={
            "steps": STEPS,
            "precision": precision,
            "activation_checkpointing": variant == "checkpointed",
        },
        optimizer={"lr": 2e-2, "eps": EPS, "clip": CLIP, "weight_decay": DECAY},
    )


def reference() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and parameters of the run in plain PyTorch."""
    model = Llama(TINY, lambda spec: PlainSparse(spec, 42))
    draw = InitialWeights(TINY, 42)
    for name, parameter in model.named_parameters():
        if "_proj" not in name:
            parameter.data.copy_(draw(name, tuple(parameter.shape)))
    optimizer = PlainAdamW((0.9, 0.999), EPS, DECAY)
    losses = []
    for tokens in batches(STEPS):
        model.zero_grad()
        logits = model.logits(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for name, parameter in model.named_parameters():
            lr = RATES["adapter" if "_proj" in name else "dense"]
            if name.endswith("values"):  # decays as the matrix elements that they are
                parameter.data.mul_(1 - lr * DECAY)
            optimizer.update(parameter, lr)
        losses.append(float(loss))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def train(run: Training) -> list[float]:
    """Losses of all updates at constant learning rates."""
    losses = []
    for step, tokens in enumerate(batches(STEPS)):
        run.engine.set_learning_rates(RATES)
        loss, _ = run.train_step(run.own_share(tokens))
        run.after_step(step + 1)
        losses.append(float(distributed.mean_over_ranks(loss)))
    return losses


def supports(run: Training) -> torch.Tensor:
    """All index buffers in one vector."""
    return torch.cat([buffer.long() for _, buffer in run.engine.model.named_buffers()])


def figures(topology: Topology) -> dict[str, Any]:
    """Every variant at every stage in fp32, and one of them in bf16."""
    expected, parameters = reference()
    found: dict[str, Any] = {"reference": expected}
    for variant in VARIANTS:
        for stage in STAGES:
            run = Training(described("fp32", variant), topology, {"stage": stage})
            before = supports(run)
            each: dict[str, Any] = {"losses": train(run)}
            if stage < 3:
                exact = run.exact()
                gaps = [float((exact[n] - p).abs().max()) for n, p in parameters.items()]
                each["difference"] = max(gaps)
            kept = torch.equal(supports(run), before) and spread([supports(run)]) == 0
            each["support_kept"] = kept
            found[f"{variant}/{stage}"] = each
            run.destroy()
    for stage in STAGES:
        run = Training(described("bf16", "layer"), topology, {"stage": stage})
        kinds = sorted({str(b.dtype) for _, b in run.engine.model.named_buffers()})
        found[f"bf16/{stage}"] = {"losses": train(run), "kinds": kinds}
        run.destroy()
    return found
