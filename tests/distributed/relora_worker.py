"""ReLoRA on the engine at every stage and reset mode against the plain reference, one start.

Run by `test_relora.py` on two ranks; rank 0 writes the figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relora_ds.config.methods.relora import ReLoRAConfig, ResetConfig
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.deepspeed.partition import build_partitioner
from relora_ds.engine.engine import TrainEngine
from relora_ds.methods.build import build_model
from relora_ds.methods.interface import projection_layers
from relora_ds.methods.registry import Phase, plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.model.llama import Llama
from relora_ds.parallel.shape import tp_local_shape
from relora_ds.parallel.topology import Topology
from tests.distributed.reference import PlainAdamW, PlainAdapter, PlainReLoRA

STAGES = (0, 1, 2, 3)
STEPS, MERGE_EVERY, RAMP, WARMUP = 14, 4, 2, 2
BATCH, MICRO, SEQUENCE, VOCAB = 8, 2, 12, 61
RESETS = {
    "zero": ResetConfig(),
    "random": ResetConfig(mode="random", fraction=0.9),
    "magnitude": ResetConfig(mode="magnitude", fraction=0.8),
    "magnitude_separate": ResetConfig(mode="magnitude", fraction=0.5, joint=False),
    "zero_keep_steps": ResetConfig(steps=False),
}
ARCHITECTURE = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=32,
    initializer_range=0.1,
)


def run_config(stage: int, reset: ResetConfig, precision: str, **method: Any) -> RunConfig:
    return RunConfig.model_validate_json(
        json.dumps(
            {
                "output_dir": "unused",
                "model": "unused",
                "deepspeed": "unused",
                "method": {
                    "name": "relora",
                    "rank": 3,
                    "alpha": 6,
                    "merge_every": MERGE_EVERY,
                    "restart_warmup_steps": RAMP,
                    "reset": reset.model_dump(),
                    **method,
                },
                "train": {
                    "steps": STEPS,
                    "seq_length": SEQUENCE,
                    "micro_batch_size": MICRO,
                    "global_batch_size": BATCH,
                    "precision": precision,
                },
                # eps 1e-3: with v near zero after a reset, a tiny eps amplifies rounding
                "optimizer": {
                    "lr": 2e-2,
                    "adapter_lr": 3e-2,
                    "eps": 1e-3,
                    "clip": 0.3,
                    "weight_decay": 0.1,
                },
                "schedule": {"warmup_steps": WARMUP},
            }
        )
    )


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=generator) for _ in range(STEPS)
    ]


def own_share(tokens: torch.Tensor, topology: Topology) -> Iterator[torch.Tensor]:
    """This rank's micro-batches of a global batch."""
    for start in range(0, BATCH, MICRO * topology.dp_size):
        at = start + topology.dp_rank * MICRO
        yield tokens[at : at + MICRO]


def reference(reset: ResetConfig) -> tuple[dict[str, torch.Tensor], PlainReLoRA, list[float]]:
    config = run_config(0, reset, "fp32")
    assert isinstance(config.method, ReLoRAConfig)
    scale = config.method.scale
    model = Llama(ARCHITECTURE, lambda spec: PlainAdapter(spec, 3, scale))
    draw = InitialWeights(ARCHITECTURE, config.train.seed)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data.copy_(draw(name, tuple(parameter.shape)))
    for layer in model.modules():
        if isinstance(layer, PlainAdapter):
            layer.draw(config.train.seed, 0)
    optimizer = PlainAdamW(config.optimizer.betas, 1e-3, 0.1)
    lrs = {"dense": 2e-2, "adapter": 3e-2}
    plain = PlainReLoRA(model, config.method, 42, STEPS, lrs, 0.3, WARMUP, optimizer)
    losses = plain.train(batches())
    return {n: p.detach() for n, p in model.named_parameters()}, plain, losses


def build(
    stage: int, config: RunConfig, topology: Topology, **zero: Any
) -> tuple[Phase, TrainEngine]:
    phase = plan_phases(config)[-1]
    draw = InitialWeights(ARCHITECTURE, config.train.seed)
    source = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 10_000, **zero}}
    resolved = resolve_deepspeed_config(source, config, topology.dp_size)
    partitioner = build_partitioner(resolved)
    model = build_model(
        ARCHITECTURE, phase.method, config.train, draw, topology.device, partitioner
    )
    tokens = batches()[0][:1, :-1]

    @torch.no_grad()
    def probe() -> torch.Tensor:
        return model.logits(tokens).float()

    exact = None if partitioner is None else partitioner.finish()
    return phase, TrainEngine(model, phase.method, config, resolved, probe, exact)


def train(phase: Phase, engine: TrainEngine, topology: Topology) -> dict[str, Any]:
    """All updates; the figures that the tests assert on."""
    found: dict[str, Any] = {"losses": [], "norms": [], "events": [], "ratios": [], "b_after": []}
    for step, tokens in enumerate(batches()):
        factor = phase.method.lr_multiplier(step, phase.schedule)
        rates = {"dense": factor * 2e-2, "adapter": factor * 3e-2}
        engine.set_learning_rates(rates)
        before = {p: whole(engine, p).clone() for _, g in engine.groups for p in g}
        loss, norm = engine.train_step(own_share(tokens, topology))
        ratios = [
            float((whole(engine, p) - before[p]).abs().max()) / rates[role]
            for role, group in engine.groups
            for p in group
            if rates[role] > 0 and role == "adapter"
        ]
        with torch.no_grad():
            event = phase.method.after_step(engine.state, engine.model, step + 1)
        found["losses"].append(float(distributed.mean_over_ranks(loss.clone())))
        found["norms"].append(float(norm))
        found["ratios"].append(max(ratios, default=0.0))
        if event is not None:
            found["events"].append({"step": step + 1, **vars(event)})
            factors = [layer.lora_B for layer in projection_layers(engine.model).values()]
            found["b_after"].append(max(float(whole(engine, b).abs().max()) for b in factors))
    elements = sum(t.numel() for s in engine.optimizer.state.values() for t in s.values() if t.ndim)
    found["state_elements"] = int(distributed.sum_over_ranks(torch.tensor(elements)))
    found["trained"] = sum(
        tp_local_shape(p).numel() for p in engine.model.parameters() if p.requires_grad
    )
    return found


def whole(engine: TrainEngine, parameter: nn.Parameter) -> torch.Tensor:
    """A working weight, fp32; a collective at stage 3."""
    return engine.layout.gather([parameter])[0].float()


def difference(engine: TrainEngine, expected: dict[str, torch.Tensor]) -> float:
    return max(
        float((whole(engine, parameter) - expected[name]).abs().max())
        for name, parameter in engine.model.named_parameters()
    )


def replicas_differ(engine: TrainEngine) -> float:
    """Largest difference of any parameter between ranks."""
    flat = torch.cat([whole(engine, p).flatten() for p in engine.model.parameters()])
    low, high = flat.clone(), flat.clone()
    torch.distributed.all_reduce(low, op=torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(high, op=torch.distributed.ReduceOp.MAX)
    return float((high - low).max())


def main(output: Path) -> None:
    topology = distributed.start(5.0)
    figures: dict[str, Any] = {}
    for mode, reset in RESETS.items():
        expected, plain, losses = reference(reset)
        for stage in STAGES:
            phase, engine = build(stage, run_config(stage, reset, "fp32"), topology)
            found = train(phase, engine, topology)
            found["difference"] = difference(engine, expected)
            found["replicas"] = replicas_differ(engine)
            found["reference_losses"], found["reference_norms"] = losses, plain.norms
            figures[f"{mode}/{stage}"] = found
            engine.destroy()
    for stage in STAGES:
        phase, engine = build(stage, run_config(stage, RESETS["zero"], "bf16"), topology)
        found = train(phase, engine, topology)
        found["replicas"] = replicas_differ(engine)
        found["values"] = {
            n: whole(engine, p).sum().item() for n, p in engine.model.named_parameters()
        }
        figures[f"bf16/{stage}"] = found
        engine.destroy()
    if topology.is_main:
        output.write_text(json.dumps(figures))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
