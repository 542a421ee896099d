"""GaLore on the engine against plain PyTorch on whole matrices, on live ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.accounting.recorder import recorder
from relora_ds.config.schema import RunConfig
from relora_ds.engine.assemble import AwaitedState
from relora_ds.methods.build import build_model
from relora_ds.methods.galore.galore import galore_layers
from relora_ds.methods.interface import projection_layers
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.parallel.shape import shard_of
from relora_ds.parallel.topology import Topology, share_models
from tests.harness.build import CUT, Training, batches, run_config
from tests.harness.resume import load, save
from tests.harness.runs import state_elements
from tests.harness.traffic import record, uneven

STEPS, EVERY, RANK, EPS = 40, 15, 3, 1e-3
RATES = {"dense": 1e-3, "adapter": 1e-3}
MODEL = CUT.model_copy(update={"num_hidden_layers": 3, "attention_bias": False})
"""Slices cut rows at every stage, and shards differ in size."""
ZEROS: dict[str, dict[str, Any]] = {
    "per layer": {"stage": 0},
    "offloaded": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "offloaded in slices": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
}
"""Of runs that do not take stage 1."""


class PlainGaLore:
    """The authors' update of one matrix, with the moments of both rules and eps after the bias
    correction."""

    def __init__(self, transport: str, side: str, every: int = EVERY) -> None:
        self._rotates, self._side, self._every = transport == "rotate", side, every
        self._basis = self._first = self._second = torch.zeros(())
        self._step = 0

    def direction(self, grad: torch.Tensor, whole: torch.Tensor | None = None) -> torch.Tensor:
        """Of an update; `whole` is the gradient that chooses the basis, if it is another one."""
        rows, cols = grad.shape
        right = {"shorter": rows >= cols, "longer": rows <= cols, "left": False}[self._side]
        seen = grad if right else grad.T
        if self._step % self._every == 0:
            choosing = grad if whole is None else whole
            choosing = choosing if right else choosing.T
            basis = torch.linalg.svd(choosing.double(), full_matrices=False).Vh[:RANK].float()
            place = torch.arange(RANK), basis.abs().argmax(1)
            basis = basis * basis[place].sign().unsqueeze(1)
            if self._step and self._rotates:
                turn = self._basis @ basis.T
                self._first = self._first @ turn
                self._second = self._second @ turn.square()
            self._basis = basis
        self._step += 1
        low = seen @ self._basis.T
        if self._step == 1:
            self._first, self._second = torch.zeros_like(low), torch.zeros_like(low)
        self._first = 0.9 * self._first + 0.1 * low
        self._second = 0.999 * self._second + 0.001 * low.square()
        root = (self._second / (1 - 0.999**self._step)).sqrt() + EPS
        change = self._first / (1 - 0.9**self._step) / root @ self._basis
        return change if right else change.T


def config_of(
    transport: str, every: int, tensor: int = 1, side: str = "shorter", **train: object
) -> RunConfig:
    """A run without clipping at a constant rate."""
    method = {"rank": RANK, "update_every": every, "transport": transport, "side": side}
    return run_config(
        {"name": "galore", **method},
        train={"steps": STEPS, **train},
        optimizer={"eps": EPS, "clip": 0.0},
        schedule={"name": "constant"},
        parallel={"tensor": tensor},
    )


def plain(transport: str, side: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final dense weights of autograd, torch's Adam and the formula."""
    config = run_config({"name": "full"})
    train, device = config.train, torch.device("cpu")
    method = plan_phases(config)[-1].method
    model = build_model(MODEL, method, train, InitialWeights(MODEL, train.seed), device)
    named = dict(model.named_parameters())
    updates = {f"{name}.weight": PlainGaLore(transport, side) for name in projection_layers(model)}
    rest = [p for name, p in named.items() if name not in updates]
    adam, losses = torch.optim.Adam(rest, lr=RATES["dense"], eps=EPS), []
    for tokens in batches(STEPS):
        model.zero_grad()
        logits = model.logits(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        adam.step()
        with torch.no_grad():
            for name, update in updates.items():
                grad = named[name].grad
                assert grad is not None
                named[name].sub_(RATES["adapter"] * update.direction(grad))
        losses.append(float(loss))
    return losses, {name: p.detach() for name, p in named.items()}


def check(topology: Topology, tensor: int, transport: str, side: str) -> dict[str, dict[str, Any]]:
    """By stage: the relative difference of every loss, and the largest difference of a dense weight
    in the end; how far this rank's number of state elements is from its share, and the elements of
    the largest matrix of state."""
    expected, weights = plain(transport, side)
    config = config_of(transport, EVERY, tensor, side)
    place = share_models(topology, config)
    found: dict[str, dict[str, Any]] = {}
    for stage in range(4):
        run = Training(config, place, {"stage": stage}, MODEL)
        losses = []
        for step, tokens in enumerate(batches(STEPS)):
            losses.append(run.update(step, tokens, RATES).loss)
            if step % EVERY == 0:
                run.check_replicas("refresh")
        pairs = zip(losses, expected, strict=True)
        found[str(stage)] = {
            "losses": [abs(a - b) / b for a, b in pairs],
            "weights": _difference(run, weights),
            "states": state_elements(run),
        }
        run.destroy()
    return found


def _difference(run: Training, expected: dict[str, torch.Tensor]) -> float:
    """Of this rank's parts of dense weights from the reference's."""
    names, worst = {p: name for name, p in run.named.items()}, 0.0
    for weight, dense in dense_weights(run).items():
        shard, wanted = shard_of(weight), expected[names[weight]]
        wanted = wanted if shard is None else shard.part(wanted)
        worst = max(worst, float((dense - wanted).abs().max()))
    return worst


def dense_weights(run: Training) -> dict[nn.Parameter, torch.Tensor]:
    """This rank's parts of the dense weights of all projections, fp32, by frozen weight."""
    found = {}
    for layer in galore_layers(run.engine.model).values():
        weight, projected, basis = run.gather([layer.weight, layer.projected, layer.basis])
        left, right = layer.factors(projected, basis)
        found[layer.weight] = weight + left @ right
    return found


def subspaces(topology: Topology) -> dict[str, Any]:
    """What a run of three gaps of four updates does to its dense weights and its bases.

    Returns:
        `changed`: updates before which a basis was another one than before; `unit`: largest
        difference of Q Q^T from 1, in fp32 and in bf16; `ratios`: by number of gaps, the largest
        singular value of the change of a weight beyond r times as many, over its first;
        `steps`: the optimizer's count of updates when they are done within the backward pass.
    """
    gap, gaps = 4, 3
    found: dict[str, Any] = {"changed": [], "unit": {}, "ratios": {}}
    for precision in ("fp32", "bf16"):
        run = Training(config_of("rotate", gap, precision=precision), topology, {"stage": 1}, MODEL)
        layers = list(galore_layers(run.engine.model).values())
        start = list(dense_weights(run).values())
        bases = [layer.basis.clone() for layer in layers]
        for step, tokens in enumerate(batches(gap * gaps)):
            run.update(step, tokens, RATES)
            now = [layer.basis.clone() for layer in layers]
            if precision == "fp32":
                if not all(torch.equal(a, b) for a, b in zip(bases, now, strict=True)):
                    found["changed"].append(step)
                if (step + 1) % gap == 0:
                    done = (step + 1) // gap
                    pairs = zip(start, dense_weights(run).values(), strict=True)
                    found["ratios"][done] = max(_beyond(b - a, RANK * done) for a, b in pairs)
            bases = now
        grams = [basis.float() @ basis.float().t() for basis in bases]
        found["unit"][precision] = max(float((g - torch.eye(RANK)).abs().max()) for g in grams)
        run.destroy()
    run = Training(config_of("rotate", gap, per_layer_update=True), topology, {"stage": 0}, MODEL)
    for step, tokens in enumerate(batches(gap)):
        run.update(step, tokens, RATES)
    found["steps"] = run.engine.completed_steps()
    run.destroy()
    return found


def _beyond(change: torch.Tensor, rank: int) -> float:
    """Share of the first singular value that is left after so many."""
    values = torch.linalg.svdvals(change.double())
    return float(values[rank] / values[0]) if rank < len(values) else 0.0


def resumed(topology: Topology, directory: str) -> dict[str, bool]:
    """Whether a run that goes on from just before, at and just after a refresh ends with the same
    bits as one that was not interrupted, by stage and break."""
    breaks, last, tokens, found = (4, 5, 6), 8, batches(8), {}
    for stage in (0, 1, 3):
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        config, saved = config_of("rotate", 5), {}
        run = Training(config, topology, zero, MODEL)
        for step in range(last):
            if step in breaks:
                saved[step] = save(run, Path(directory) / f"{stage}_{step}")
            run.update(step, tokens[step], RATES)
        expected = [value.clone() for value in run.gather(list(run.named.values()))]
        run.destroy()
        for first, broken in saved.items():
            run = Training(config, topology, zero, MODEL, weights=AwaitedState())
            load(run, broken)
            for step in range(first, last):
                run.update(step, tokens[step], RATES)
            again = run.gather(list(run.named.values()))
            same = all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
            found[f"{stage}/{first}"] = same
            run.destroy()
    return found


def moved(topology: Topology) -> dict[str, dict[str, Any]]:
    """By stage: recorded and predicted payloads of an update, and what a refresh reduced and
    broadcast beside the bytes of whole gradients and of bases."""
    found = {}
    with recorder:
        for stage in range(4):
            found[str(stage)] = record(topology, uneven("galore", "fp32", 2), {"stage": stage})
            run = Training(config_of("rotate", 5), topology, {"stage": stage}, MODEL)
            volumes = recorder.step_volumes()
            for step, tokens in enumerate(batches(6)):
                run.set_rates(step, RATES)
                share = run.own_share(tokens)
                run.engine.state.gradients.batch = partial(iter, share)
                recorder.begin_step()
                run.before_step(step)
                volumes = recorder.step_volumes()
                run.train_step(share)
            sums: dict[str, float] = {"reduce": 0, "broadcast": 0}
            for kind, volume in volumes.items():
                if kind.operation in sums:
                    sums[kind.operation] += volume.payload
            sides = [
                (layer.spec.out_features, layer.spec.in_features)
                for layer in projection_layers(run.engine.model).values()
            ]
            wanted = {
                "reduce": 4 * sum(m * n for m, n in sides),
                "broadcast": 4 * RANK * sum(map(min, sides)),
            }
            found[str(stage)] |= {"refresh": sums, "refresh_expected": wanted}
            run.destroy()
    return found


def variants(topology: Topology) -> dict[str, list[float]]:
    """Losses of runs with settings that change how a step is done, by name."""
    found = {}
    for name, train, optimizer, method in (
        ("plain", {}, {}, {}),
        ("recomputed", {"activation_checkpointing": True}, {}, {}),
        ("per layer", {"per_layer_update": True}, {}, {}),
        ("one reduction", {"gradient_reduction": "step"}, {}, {}),
        ("randomised", {}, {}, {"svd": "randomised"}),
        ("offloaded", {}, {}, {}),
        ("offloaded in slices", {}, {}, {}),
        ("eight bits", {}, {"name": "adamw8bit"}, {"transport": "none"}),
        ("bf16", {"precision": "bf16"}, {}, {}),
    ):
        config = run_config(
            {"name": "galore", "rank": RANK, "update_every": 5, **method},
            train={"steps": STEPS, **train},
            optimizer={"eps": EPS, "clip": 0.0, **optimizer},
            schedule={"name": "constant"},
        )
        run = Training(config, topology, ZEROS.get(name, {"stage": 1}), MODEL)
        found[name] = [
            run.update(step, tokens, RATES).loss for step, tokens in enumerate(batches(12))
        ]
        run.check_replicas()
        run.destroy()
    return found
