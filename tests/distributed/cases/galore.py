"""GaLore on the engine against plain PyTorch on whole matrices, on live ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from relora_ds.methods.build import build_model
from relora_ds.methods.interface import projection_layers
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.parallel.topology import Topology, share_models
from tests.harness.build import CUT, Training, batches, run_config

STEPS, EVERY, RANK, EPS = 40, 15, 4, 1e-3
RATES = {"dense": 1e-3, "adapter": 1e-3}
MODEL = CUT.model_copy(update={"attention_bias": False})
"""Slices cut rows at every stage, and shards differ in size."""


class PlainGaLore:
    """The authors' update of one matrix, with the moments of both rules and eps after the bias
    correction."""

    def __init__(self, transport: str) -> None:
        self._rotates = transport == "rotate"
        self._basis = self._first = self._second = torch.zeros(())
        self._step = 0

    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        tall = grad.shape[0] >= grad.shape[1]
        seen = grad if tall else grad.T
        if self._step % EVERY == 0:
            basis = torch.linalg.svd(seen.double(), full_matrices=False).Vh[:RANK].float()
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
        return change if tall else change.T


def plain(transport: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final dense weights of autograd, torch's Adam and the formula."""
    config = run_config({"name": "full"})
    train, device = config.train, torch.device("cpu")
    method = plan_phases(config)[-1].method
    model = build_model(MODEL, method, train, InitialWeights(MODEL, train.seed), device)
    named = dict(model.named_parameters())
    updates = {f"{name}.weight": PlainGaLore(transport) for name in projection_layers(model)}
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


def check(topology: Topology, tensor: int, transport: str) -> dict[str, dict[str, Any]]:
    """By stage: the relative difference of every loss."""
    expected, _ = plain(transport)
    config = run_config(
        {"name": "galore", "rank": RANK, "update_every": EVERY, "transport": transport},
        train={"steps": STEPS},
        optimizer={"eps": EPS, "clip": 0.0},
        schedule={"name": "constant"},
        parallel={"tensor": tensor},
    )
    place = share_models(topology, config)
    found: dict[str, dict[str, Any]] = {}
    for stage in range(4):
        run = Training(config, place, {"stage": stage}, MODEL)
        losses = []
        for step, tokens in enumerate(batches(STEPS)):
            losses.append(run.update(step, tokens, RATES).loss)
            run.engine.check_replicas(run.session.replicas())
        pairs = zip(losses, expected, strict=True)
        found[str(stage)] = {"losses": [abs(a - b) / b for a, b in pairs]}
        run.destroy()
    return found
