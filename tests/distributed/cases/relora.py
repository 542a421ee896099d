"""ReLoRA on the engine at every stage and reset mode, beside the plain reference."""

from __future__ import annotations

from typing import Any

import torch

from relora_ds.config.methods.relora import ReLoRAConfig
from relora_ds.model.init import InitialWeights
from relora_ds.model.llama import Llama
from relora_ds.parallel.topology import Topology
from tests.harness.build import STAGES, TINY, batches, changed
from tests.harness.reference import PlainAdamW, PlainAdapter, PlainReLoRA
from tests.harness.runs import RATES, RESETS, STEPS, WARMUP, relora, start, train_observed


def reference(reset: str) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Parameters, losses and gradient norms of the run in plain PyTorch."""
    config = relora(reset, "fp32")
    assert isinstance(config.method, ReLoRAConfig)
    scale = config.method.scale
    model = Llama(TINY, lambda spec: PlainAdapter(spec, 3, scale))
    draw = InitialWeights(TINY, config.train.seed)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data.copy_(draw(name, tuple(parameter.shape)))
    for layer in model.modules():
        if isinstance(layer, PlainAdapter):
            layer.draw(config.train.seed, 0)
    optimizer = PlainAdamW(config.optimizer.betas, 1e-3, 0.1)
    plain = PlainReLoRA(model, config.method, 42, STEPS, RATES, 0.3, WARMUP, optimizer)
    losses = plain.train(batches(STEPS))
    return {n: p.detach() for n, p in model.named_parameters()}, losses, plain.norms


def figures(topology: Topology) -> dict[str, Any]:
    """Every reset mode at every stage in fp32, and the first one in bf16."""
    found: dict[str, Any] = {}
    for mode in RESETS:
        expected, losses, norms = reference(mode)
        for stage in STAGES:
            run = start(relora(mode, "fp32"), stage, topology)
            found[f"{mode}/{stage}"] = train_observed(run) | {
                "difference": run.difference(expected),
                "reference_losses": losses,
                "reference_norms": norms,
            }
            run.destroy()
    for stage in STAGES:
        # one arithmetic at every stage: by itself stage 3 would not keep composed weights, and a
        # composed weight in bf16 may differ between stages in its last bit
        config = changed(relora("zero", "bf16"), "train", formulation="split")
        run = start(config, stage, topology)
        found[f"bf16/{stage}"] = train_observed(run)
        run.destroy()
    return found
