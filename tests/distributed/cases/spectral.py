"""Spectral updates on the engine against their formula on dense products, on live ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from relora_ds.methods.interface import (
    Method,
    Session,
    matrix_rules,
    optimizer_groups,
    projection_layers,
)
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.optim.matrix_wise.inverse_root import inverse_root
from relora_ds.optim.vector_clock import VectorClock
from relora_ds.parallel.shape import shard_of
from relora_ds.parallel.topology import Topology, share_models
from tests.harness.build import CUT, Training, batches, run_config
from tests.harness.resume import load, save
from tests.unit.methods.memory_state import MemoryState, StoredMoments, memory_state

STEPS, EPS, CLIP, DECAY = 12, 1e-3, 0.3, 0.1
_BREAK = 7
"""Updates before an interruption: after a merge, while vectors are frozen."""
RATES = {"dense": 1e-2, "adapter": 5e-3, "pair": 2e-2}
MODEL = CUT.model_copy(update={"num_hidden_layers": 3, "attention_bias": False})
"""Slices cut factors at every stage, and shards differ in size."""
METHODS: dict[str, dict[str, Any]] = {
    "low_rank": {"name": "low_rank", "rank": 4},
    "sltrain": {"name": "sltrain", "rank": 4, "scale": 0.5, "sparsity": 0.1},
    "lora": {"name": "lora", "rank": 4, "alpha": 8},
    "relora": {
        "name": "relora",
        "rank": 4,
        "alpha": 8,
        "merge_every": 5,
        "restart_warmup_steps": 1,
    },
    # vectors are switched before two of three updates, and frozen for two
    "switchlora": {
        "name": "switchlora",
        "rank": 4,
        "interval": 4,
        "freeze_steps": 2,
        "descent_rate": 1.0,
    },
}
"""In `sltrain` and `lora` B starts at zero, in `relora` after every merge too."""


def described(method: str, tensor: int, plan: str) -> RunConfig:
    """A run of one method under the spectral optimizer; its micro-batches are accumulated."""
    return run_config(
        METHODS[method],
        train={"steps": STEPS},
        optimizer={"eps": EPS, "clip": CLIP, "weight_decay": DECAY, "adapter": "spectral"},
        schedule={"name": "constant"},
        parallel={"tensor": tensor, "low_rank_plan": plan},
    )


def plain(method: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of autograd, torch's AdamW, and polar factors of dense changes of
    the products, in fp64. Events happen on plain tensors."""
    config = described(method, 1, "auto")
    train = config.train
    phase = plan_phases(config)[-1]
    of_run = phase.method
    weights = InitialWeights(MODEL, train.seed)
    model = build_model(MODEL, of_run, train, weights, torch.device("cpu"))
    pairs = [(f"{name}.lora_A", f"{name}.lora_B") for name in projection_layers(model)]
    paired = {name for pair in pairs for name in pair}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: p for name, p in named.items() if name not in paired}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in rest.items():
        role = "adapter" if name.endswith(".values") else "dense"
        groups.setdefault((role, of_run.decays(name, parameter)), []).append(parameter)
    described_groups = [
        {"params": found, "lr": RATES[role], "weight_decay": DECAY if decays else 0.0}
        for (role, decays), found in groups.items()
    ]
    adam = torch.optim.AdamW(described_groups, eps=EPS)
    momenta = {name: torch.zeros_like(named[name]).double() for name in paired}
    state, session = _events(of_run, model, momenta)
    losses = []
    for step, tokens in enumerate(batches(STEPS)):
        with torch.no_grad():
            session.before_step(step)
        factor = of_run.lr_multiplier(step, phase.schedule)
        for group, (role, _) in zip(adam.param_groups, groups, strict=True):
            group["lr"] = factor * RATES[role]
        model.zero_grad()
        logits = model.logits(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(list(named.values()), CLIP)
        adam.step()
        with torch.no_grad():
            for pair in pairs:
                factors = [named[name] for name in pair]
                _step(factors, [momenta[n] for n in pair], factor * RATES["pair"], state)
            state.completed += 1
            session.after_step(step + 1)
        losses.append(float(loss))
    return losses, {name: p.detach() for name, p in named.items()}


def _events(
    method: Method[Any], model: nn.Module, momenta: Mapping[str, torch.Tensor]
) -> tuple[MemoryState, Session[Any]]:
    """The method at work on the model, with the momenta where it looks for moments."""
    state = memory_state(model, "working")
    state.completed = 0
    for name, parameter in model.named_parameters():
        if name in momenta:
            nothing = torch.zeros_like(parameter)
            state.stored[parameter] = StoredMoments(momenta[name], nothing)
    for parameter, axis in method.vector_axes(model).items():
        state.clocks[parameter] = VectorClock(parameter.shape[axis], axis)
    with torch.no_grad():
        return state, method.start(state, model)


def _step(
    factors: Sequence[nn.Parameter],
    momenta: Sequence[torch.Tensor],
    lr: float,
    state: MemoryState,
) -> None:
    """Move A and B; vectors that are frozen have no gradient and stay where they are."""
    ahead, live = [], []
    for factor, momentum in zip(factors, momenta, strict=True):
        assert factor.grad is not None
        clock = state.clocks.get(factor)
        mask = torch.ones(1, 1)
        if clock is not None:
            mask = clock.live(state.completed).unsqueeze(1 - clock.axis).float()
        grad = factor.grad * mask
        momentum.copy_(0.95 * momentum + 0.05 * grad)
        ahead.append(0.05 * grad + 0.95 * momentum)
        live.append(mask)
    a, b = (factor.double() for factor in factors)
    direction = _polar(ahead[1] @ a + b @ ahead[0])
    rate = 0.5 * lr * math.sqrt(max(1.0, b.shape[0] / a.shape[1]))
    for factor, mask, move in zip(factors, live, (b.T @ direction, direction @ a.T), strict=True):
        factor.sub_(mask * (lr * DECAY * factor + rate * move))


def _polar(matrix: torch.Tensor) -> torch.Tensor:
    """The polar factor, by singular value decomposition; the smallest singular values end below 1
    as they do in the product."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    size = s.norm().clamp(min=1e-300)
    rough, root = inverse_root((s / size).square().diag()[None])
    return (u * (s / size * (rough * root)[0].diagonal())) @ vh


def check(topology: Topology, tensor: int, method: str, plan: str) -> dict[str, dict[str, Any]]:
    """By stage: largest relative difference of a loss, largest difference of a weight, bytes that
    factors moved in a step and the same in closed form, elements of the momenta on all ranks."""
    expected, weights = plain(method)
    found: dict[str, dict[str, Any]] = {}
    config = described(method, tensor, plan)
    place = share_models(topology, config)
    for name, group in (("tp", place.tp.group), ("dp", place.tp.data_group)):
        if group is not None:
            recorder.name_group(group, name)
    for stage in range(4):
        run = Training(config, place, {"stage": stage}, MODEL)
        losses = []
        for step, tokens in enumerate(batches(STEPS)):
            with recorder:
                recorder.begin_step()
                losses.append(run.update(step, tokens, RATES).loss)
        moved = {
            f"{kind.operation} {kind.group}": volume.payload
            for kind, volume in recorder.step_volumes().items()
            if kind.operation in ("send", "recv")
        }
        trained = {name: p for name, p in run.named.items() if name in weights}
        worst = 0.0
        for (name, parameter), value in zip(
            trained.items(), run.gather(list(trained.values())), strict=True
        ):
            shard = shard_of(parameter)
            wanted = weights[name] if shard is None else shard.part(weights[name])
            worst = max(worst, float((value - wanted).abs().max()))
        pairs = zip(losses, expected, strict=True)
        slices = run.engine.matrices.by_parameter.values()
        found[str(stage)] = {
            "loss": max(abs(a - b) / b for a, b in pairs),
            "weight": worst,
            "moved": moved,
            "expected": _closed_form(config, run, place),
            "held": _over_ranks(sum(s.numel() for each in slices for s in each.state.values())),
            "factors": sum(weight.numel() for name, weight in weights.items() if ".lora_" in name),
        }
        run.destroy()
    return found


def _over_ranks(count: int) -> int:
    total = torch.tensor(count)
    torch.distributed.all_reduce(total)
    return int(total)


def resume(
    topology: Topology, directory: Path, method: str, tensor: int, plan: str, stage: int
) -> dict[str, Any]:
    """Losses and weights after an interruption, and without it; the gradients' norms too."""
    config = described(method, tensor, plan)
    place, tokens, found = share_models(topology, config), batches(STEPS), {}
    run = Training(config, place, {"stage": stage}, MODEL)
    for step in range(_BREAK):
        run.update(step, tokens[step], RATES)
    saved = save(run, directory)
    found["whole"] = _rest(run, tokens)
    run = Training(config, place, {"stage": stage}, MODEL, weights=AwaitedState())
    load(run, saved)
    found["resumed"] = _rest(run, tokens)
    return found


def _rest(run: Training, tokens: Sequence[torch.Tensor]) -> list[float]:
    """Losses and norms of the updates after the interruption, and a sum of every weight."""
    found = [run.update(step, tokens[step], RATES) for step in range(_BREAK, STEPS)]
    weights = run.gather(list(run.named.values()))
    run.destroy()
    sums = [float(weight.double().sum()) for weight in weights]
    return [*(each.loss for each in found), *(each.norm for each in found), *sums]


def _closed_form(config: RunConfig, run: Training, place: Topology) -> dict[str, int]:
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
