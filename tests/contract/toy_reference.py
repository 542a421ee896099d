"""The toy method's updates on the engine against plain PyTorch on whole matrices, on live ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.methods.build import build_model
from relora_ds.methods.interface import projection_layers
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.parallel.shape import shard_of
from relora_ds.parallel.topology import Topology, share_models
from tests.contract.toy import BETA, SubspaceMomentum, toy
from tests.harness.build import TINY, Training, batches, run_config

STEPS, WIDTH, EPS, CLIP = 6, 3, 1e-3, 0.3
RATES = {"dense": 1e-2, "adapter": 0.3}


def plain() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of dense autograd, torch's AdamW and the formula of the rule."""
    config = run_config({"name": "full"})
    train, device = config.train, torch.device("cpu")

    method = plan_phases(config)[-1].method
    model = build_model(TINY, method, train, InitialWeights(TINY, train.seed), device)
    moved = {f"{name}.weight": layer for name, layer in projection_layers(model).items()}
    named = dict(model.named_parameters())
    dense = [p for name, p in named.items() if name not in moved]
    adam = torch.optim.AdamW(dense, lr=RATES["dense"], eps=EPS, weight_decay=0.0)
    rule, momenta, losses = SubspaceMomentum(WIDTH, train.seed), {}, []
    for tokens in batches(STEPS):
        model.zero_grad()
        logits = model.logits(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(list(named.values()), CLIP)
        adam.step()
        with torch.no_grad():
            for name in moved:
                weight = named[name]
                assert weight.grad is not None
                basis = rule.basis(name, weight.shape[0])
                momenta[name] = BETA * momenta.get(name, 0.0) + basis.t() @ weight.grad
                weight -= RATES["adapter"] * basis @ momenta[name]
        losses.append(float(loss))
    return losses, {name: p.detach() for name, p in named.items()}


def check(topology: Topology, tensor: int) -> dict[str, dict[str, Any]]:
    """By stage: largest relative difference of a loss, and largest difference of a weight."""
    expected, weights = plain()
    found: dict[str, dict[str, Any]] = {}
    with toy():
        config = run_config(
            {"name": "toy", "width": WIDTH},
            optimizer={"eps": EPS, "clip": CLIP},
            schedule={"name": "constant"},
            parallel={"tensor": tensor},
        )
        place = share_models(topology, config)
        for stage in range(4):
            run = Training(config, place, {"stage": stage})
            losses = [
                run.update(step, tokens, RATES).loss for step, tokens in enumerate(batches(STEPS))
            ]
            named = run.named
            worst = 0.0
            for (name, parameter), value in zip(
                named.items(), run.gather(list(named.values())), strict=True
            ):
                shard = shard_of(parameter)
                wanted = weights[name] if shard is None else shard.part(weights[name])
                worst = max(worst, float((value - wanted).abs().max()))
            pairs = zip(losses, expected, strict=True)
            found[str(stage)] = {
                "loss": max(abs(a - b) / b for a, b in pairs),
                "weight": worst,
            }
            run.destroy()
    return found
