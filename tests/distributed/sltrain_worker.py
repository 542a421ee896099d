"""SLTrain on the engine at every stage against plain autograd with dense weights, one start.

Run by `test_sltrain.py` on one and on two ranks; rank 0 writes the figures.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.deepspeed.partition import build_partitioner
from relora_ds.engine.engine import TrainEngine
from relora_ds.engine.handover import exact_parameters
from relora_ds.methods.build import build_model
from relora_ds.methods.registry import Phase, plan_phases
from relora_ds.methods.sltrain.support import draw_support, flat_positions, support_size
from relora_ds.model.init import InitialWeights
from relora_ds.model.llama import Llama
from relora_ds.parallel.linear import LinearSpec, Projection
from relora_ds.parallel.topology import Topology
from relora_ds.randomness import Stream
from tests.distributed.reference import PlainAdamW
from tests.distributed.relora_worker import (
    ARCHITECTURE,
    BATCH,
    MICRO,
    SEQUENCE,
    batches,
    own_share,
)

STEPS = 8
STAGES = (0, 1, 2, 3)
RANK, SPARSITY, SCALE = 3, 0.1, 2.0
LRS = {"dense": 2e-2, "adapter": 3e-2}
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


def run_config(precision: str, variant: str) -> RunConfig:
    method = {"name": "sltrain", "rank": RANK, "scale": SCALE, "sparsity": SPARSITY}
    return RunConfig.model_validate_json(
        json.dumps(
            {
                "output_dir": "unused",
                "model": "unused",
                "deepspeed": "unused",
                "method": method | VARIANTS[variant],
                "train": {
                    "steps": STEPS,
                    "seq_length": SEQUENCE,
                    "micro_batch_size": MICRO,
                    "global_batch_size": BATCH,
                    "precision": precision,
                    "activation_checkpointing": variant == "checkpointed",
                },
                "optimizer": {"lr": 2e-2, "eps": EPS, "clip": CLIP, "weight_decay": DECAY},
            }
        )
    )


def reference() -> tuple[list[float], dict[str, torch.Tensor]]:
    model = Llama(ARCHITECTURE, lambda spec: PlainSparse(spec, 42))
    draw = InitialWeights(ARCHITECTURE, 42)
    for name, parameter in model.named_parameters():
        if "_proj" not in name:
            parameter.data.copy_(draw(name, tuple(parameter.shape)))
    optimizer = PlainAdamW((0.9, 0.999), EPS, DECAY)
    losses = []
    for tokens in batches()[:STEPS]:
        model.zero_grad()
        logits = model.logits(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for name, parameter in model.named_parameters():
            lr = LRS["adapter" if "_proj" in name else "dense"]
            if name.endswith("values"):  # decays as the matrix elements that they are
                parameter.data.mul_(1 - lr * DECAY)
            optimizer.update(parameter, lr)
        losses.append(float(loss))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def build(stage: int, config: RunConfig, topology: Topology) -> tuple[Phase, TrainEngine]:
    phase = plan_phases(config)[-1]
    zero = {"zero_optimization": {"stage": stage}}
    resolved = resolve_deepspeed_config(zero, config, topology.dp_size)
    draw = InitialWeights(ARCHITECTURE, config.train.seed)
    partitioner = build_partitioner(resolved)
    model = build_model(
        ARCHITECTURE, phase.method, config.train, draw, topology.device, partitioner
    )
    exact = None if partitioner is None else partitioner.finish()
    return phase, TrainEngine(model, phase.method, config, resolved, lambda: None, exact)


def train(phase: Phase, engine: TrainEngine, topology: Topology) -> list[float]:
    losses = []
    for step, tokens in enumerate(batches()[:STEPS]):
        engine.set_learning_rates(LRS)
        loss, _ = engine.train_step(own_share(tokens, topology))
        with torch.no_grad():
            phase.method.after_step(engine.state, engine.model, step + 1)
        losses.append(float(distributed.mean_over_ranks(loss.clone())))
    return losses


def supports(engine: TrainEngine) -> torch.Tensor:
    """All index buffers in one vector."""
    return torch.cat([buffer.long() for _, buffer in engine.model.named_buffers()])


def main(output: Path) -> None:
    topology = distributed.start(5.0)
    expected, parameters = reference()
    figures: dict[str, Any] = {"reference": expected}
    for variant in VARIANTS:
        for stage in STAGES:
            phase, engine = build(stage, run_config("fp32", variant), topology)
            before = supports(engine)
            found: dict[str, Any] = {"losses": train(phase, engine, topology)}
            if stage < 3:
                exact = exact_parameters(engine)
                gaps = [float((exact[n] - p).abs().max()) for n, p in parameters.items()]
                found["difference"] = max(gaps)
            low, high = supports(engine), supports(engine)
            torch.distributed.all_reduce(low, op=torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(high, op=torch.distributed.ReduceOp.MAX)
            found["support_kept"] = bool((low == before).all() and (high == before).all())
            figures[f"{variant}/{stage}"] = found
            engine.destroy()
    for stage in STAGES:
        phase, engine = build(stage, run_config("bf16", "layer"), topology)
        kinds = sorted({str(b.dtype) for _, b in engine.model.named_buffers()})
        figures[f"bf16/{stage}"] = {"losses": train(phase, engine, topology), "kinds": kinds}
        engine.destroy()
    if topology.is_main:
        output.write_text(json.dumps(figures))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
