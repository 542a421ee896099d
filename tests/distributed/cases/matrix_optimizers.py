"""Muon and SCALE on the engine against plain PyTorch on whole matrices, on live ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.accounting.matrix_traffic import MatrixTraffic, Place, matrix_traffic
from relora_ds.accounting.recorder import recorder
from relora_ds.config.schema import RunConfig
from relora_ds.engine.assemble import AwaitedState
from relora_ds.methods.build import build_model, sharded_meta_model
from relora_ds.methods.interface import matrix_rules, optimizer_groups, projection_layers
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import EMBEDDING, HEAD, InitialWeights
from relora_ds.optim.matrix_wise.polar import KELLER, POLAR_EXPRESS, Coefficients
from relora_ds.parallel.shape import shard_of
from relora_ds.parallel.topology import Topology, share_models
from tests.harness.build import CUT, Training, batches, run_config
from tests.harness.resume import load, save
from tests.harness.runs import state_elements

EPS, CLIP, DECAY = 1e-3, 0.3, 0.1
MODEL = CUT.model_copy(update={"num_hidden_layers": 3, "attention_bias": False})
"""Slices cut matrices at every stage, and shards differ in size."""


def polar_in_steps(matrix: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    """The iteration of torch.optim.Muon in the matrix's own precision."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class PlainMuon:
    """torch.optim.Muon's update, but for the precision of the polar factor."""

    def __init__(self, name: str, coefficients: Coefficients) -> None:
        self._coefficients, self._momentum = coefficients, torch.zeros(())

    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        self._momentum = 0.95 * self._momentum + 0.05 * grad
        ahead = 0.05 * grad + 0.95 * self._momentum
        m, n = grad.shape
        return max(1.0, m / n) ** 0.5 * polar_in_steps(ahead, self._coefficients)


class PlainScale:
    """A gradient divided by the root mean square over its inputs."""

    def __init__(self, name: str) -> None:
        self._name, self._momentum = name, torch.zeros(())

    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        if self._name == HEAD:
            self._momentum = 0.9 * self._momentum + 0.1 * grad
            grad = self._momentum
        mean = grad.square().mean(0 if self._name == EMBEDDING else 1, keepdim=True)
        return grad / (mean.sqrt() + 1e-8)


@dataclass(frozen=True)
class Rule:
    """Settings of a matrix-wise optimizer, its plain counterpart, and rates it is stable at."""

    settings: dict[str, Any]
    plain: Callable[[str], PlainMuon | PlainScale]
    rates: dict[str, float]
    method: dict[str, Any] = field(default_factory=lambda: {"name": "full"})


_FAST, _SLOW = {"dense": 1e-2, "adapter": 1e-2}, {"dense": 1e-3, "adapter": 1e-3}
RULES = {
    "muon": Rule({"matrix": "muon"}, lambda name: PlainMuon(name, POLAR_EXPRESS), _FAST),
    "keller": Rule(
        {"matrix": "muon", "muon": {"steps": "keller"}},
        lambda name: PlainMuon(name, KELLER),
        _FAST,
    ),
    "scale": Rule({"matrix": "scale"}, PlainScale, _SLOW),
    # embedding and head alone
    "ends": Rule({"matrix": "scale"}, PlainScale, _SLOW, {"name": "low_rank", "rank": 4}),
}


def plain(rule: str, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of so many updates and final weights of autograd, torch's AdamW and the formula
    of the rule."""
    config, rates = run_config(RULES[rule].method), RULES[rule].rates
    train, device = config.train, torch.device("cpu")
    method = plan_phases(config)[-1].method
    model = build_model(MODEL, method, train, InitialWeights(MODEL, train.seed), device)
    named = dict(model.named_parameters())
    weights = (f"{name}.weight" for name in projection_layers(model))
    moved = {name: "adapter" for name in weights if name in named}
    if rule in ("scale", "ends"):
        moved |= {EMBEDDING: "dense", HEAD: "dense"}
    dense = [p for name, p in named.items() if name not in moved]
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in dense if p.dim() > 1], "weight_decay": DECAY},
            {"params": [p for p in dense if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=rates["dense"],
        eps=EPS,
    )
    updates, losses = {name: RULES[rule].plain(name) for name in moved}, []
    for tokens in batches(steps):
        model.zero_grad()
        logits = model.logits(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(list(named.values()), CLIP)
        adam.step()
        with torch.no_grad():
            for name, role in moved.items():
                weight = named[name]
                grad = weight.grad
                assert grad is not None
                weight *= 1 - rates[role] * DECAY
                weight -= rates[role] * updates[name].direction(grad)
        losses.append(float(loss))
    return losses, {name: p.detach() for name, p in named.items()}


def config_of(rule: str, tensor: int = 1) -> RunConfig:
    """A run at a constant rate that is clipped at every step."""
    return run_config(
        RULES[rule].method,
        optimizer={"eps": EPS, "clip": CLIP, "weight_decay": DECAY, **RULES[rule].settings},
        schedule={"name": "constant"},
        parallel={"tensor": tensor},
    )


def check(topology: Topology, tensor: int, rule: str, steps: int) -> dict[str, dict[str, Any]]:
    """By stage: largest relative difference of a loss, largest difference of a weight, bytes that
    matrices moved in a step, and the same in closed form."""
    expected, weights = plain(rule, steps)
    found: dict[str, dict[str, Any]] = {}
    config = config_of(rule, tensor)
    place = share_models(topology, config)
    for name, group in (("tp", place.tp.group), ("dp", place.tp.data_group)):
        if group is not None:
            recorder.name_group(group, name)
    for stage in range(4):
        run = Training(config, place, {"stage": stage}, MODEL)
        losses = []
        for step, tokens in enumerate(batches(steps)):
            with recorder:
                recorder.begin_step()
                losses.append(run.update(step, tokens, RULES[rule].rates).loss)
        moved = {
            f"{kind.operation} {kind.group}": volume.payload
            for kind, volume in recorder.step_volumes().items()
            if kind.operation in ("send", "recv")
        }
        worst = 0.0
        for (name, parameter), value in zip(
            run.named.items(), run.gather(list(run.named.values())), strict=True
        ):
            shard = shard_of(parameter)
            wanted = weights[name] if shard is None else shard.part(weights[name])
            worst = max(worst, float((value - wanted).abs().max()))
        pairs = zip(losses, expected, strict=True)
        found[str(stage)] = {
            "loss": max(abs(a - b) / b for a, b in pairs),
            "weight": worst,
            "moved": moved,
            "expected": closed_form(config, run, place),
            "states": state_elements(run),
        }
        run.destroy()
    return found


def resumed(topology: Topology, directory: str) -> dict[str, bool]:
    """Whether a run that goes on from a break ends with the same bits as one that was not
    interrupted, by rule and stage."""
    first, last, tokens, found = 3, 6, batches(6), {}
    for rule in ("muon", "scale"):
        for stage in (0, 1, 3):
            config, rates = config_of(rule), RULES[rule].rates
            run = Training(config, topology, {"stage": stage}, MODEL)
            for step in range(first):
                run.update(step, tokens[step], rates)
            saved = save(run, Path(directory) / f"{rule}_{stage}")
            for step in range(first, last):
                run.update(step, tokens[step], rates)
            expected = [value.clone() for value in run.gather(list(run.named.values()))]
            run.destroy()
            run = Training(config, topology, {"stage": stage}, MODEL, weights=AwaitedState())
            load(run, saved)
            for step in range(first, last):
                run.update(step, tokens[step], rates)
            again = run.gather(list(run.named.values()))
            same = all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
            found[f"{rule}/{stage}"] = same
            run.destroy()
    return found


def closed_form(config: RunConfig, run: Training, place: Topology) -> dict[str, int]:
    """Payload bytes of messages that carry slices, by operation and group."""
    tp = place.tp
    model = sharded_meta_model(MODEL, run.method, config.train, tp)
    groups = [group.parameters for group in optimizer_groups(run.method, config.optimizer, model)]
    rules = matrix_rules(run.method, config.optimizer, model)
    sizes, rank = (place.dp_size, tp.size), Place(place.dp_rank, tp.rank)
    found = matrix_traffic(model, groups, rules, run.zero, sizes, rank)
    name = "world" if tp.size == 1 else "dp"
    payloads = {
        **MatrixTraffic.payloads(found.sliced, name, place.dp_size),
        **MatrixTraffic.payloads(found.sharded, "tp", tp.size),
    }
    return {
        f"{kind.operation} {kind.group}": payload
        for kind, payload in payloads.items()
        if kind.operation in ("send", "recv")
    }
