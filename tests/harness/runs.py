"""Runs of the tiny model that several test files share, and what is observed of them."""

from __future__ import annotations

from typing import Any

import torch

from relora_ds.config.methods.relora import ResetConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.parallel.shape import tp_local_shape
from relora_ds.parallel.topology import Topology
from tests.harness.build import Training, batches, changed, run_config

STEPS, MERGE_EVERY, WARMUP = 14, 4, 2
RATES = {"dense": 2e-2, "adapter": 3e-2, "pair": 3e-2}
RESETS = {
    "zero": ResetConfig(),
    "random": ResetConfig(mode="random", fraction=0.9),
    "magnitude": ResetConfig(mode="magnitude", fraction=0.8),
    "magnitude_separate": ResetConfig(mode="magnitude", fraction=0.5, joint=False),
    "zero_keep_steps": ResetConfig(steps=False),
}
# eps 1e-3: with v near zero after a reset, a tiny eps amplifies rounding
OPTIMIZER = {"lr": 2e-2, "adapter_lr": 3e-2, "eps": 1e-3, "clip": 0.3, "weight_decay": 0.1}
SMALL_BUCKETS = {"reduce_bucket_size": 10_000}

SWITCH_STEPS, SWITCH_SEED = 204, 11
SWITCH_RATES = {"dense": 1e-3, "adapter": 3e-3}

EVENTFUL_STEPS = 10
EVENTFUL: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "relora": {
        "name": "relora",
        "rank": 3,
        "alpha": 6,
        "merge_every": 4,
        "restart_warmup_steps": 2,
    },
    "low_rank": {"name": "low_rank", "rank": 3},
    "sltrain": {"name": "sltrain", "rank": 3, "scale": 1.0, "sparsity": 0.1},
    # vectors are switched before two of three updates and frozen for two
    "switchlora": {
        "name": "switchlora",
        "rank": 4,
        "interval": 4,
        "freeze_steps": 2,
        "descent_rate": 1.0,
    },
}
"""Methods of which everything that they ever do happens within ten steps."""


def clipped(method: dict[str, Any], precision: str = "fp32", **optimizer: object) -> RunConfig:
    """A run of 14 steps, clipped at every one."""
    return run_config(
        method,
        train={"steps": STEPS, "precision": precision},
        optimizer={**OPTIMIZER, **optimizer},
        schedule={"warmup_steps": WARMUP},
    )


def relora(reset: str, precision: str, **method: object) -> RunConfig:
    """A clipped run of ReLoRA with three merges."""
    described = {
        "name": "relora",
        "rank": 3,
        "alpha": 6,
        "merge_every": MERGE_EVERY,
        "restart_warmup_steps": 2,
        "reset": RESETS[reset].model_dump(),
    }
    return clipped(described | method, precision)


def switchlora(precision: str, **method: object) -> RunConfig:
    """A clipped run of SwitchLoRA in which vectors are switched before almost every update."""
    described = {"name": "switchlora", "rank": 5, "interval": 10, "descent_rate": 1.0}
    config = clipped(described | method, precision, clip=0.05)
    return changed(config, "train", steps=SWITCH_STEPS)


def start(config: RunConfig, stage: int, topology: Topology, **zero: object) -> Training:
    """A run under an engine of small buckets, with a probe for the drift of the output."""
    probe = batches(1)[0][:1, :-1]
    return Training(config, topology, {"stage": stage, **SMALL_BUCKETS, **zero}, probe=probe)


def train_observed(run: Training) -> dict[str, Any]:
    """All updates of a clipped run, and everything that can be seen of them.

    Returns:
        Per step `losses`, `norms` and `ratios` (largest change of an adapter's element over its
        learning rate); per event the `events` and `b_after` (largest element of a `lora_B`);
        `state_elements` of the optimizer over all ranks, and the `trained` elements that they
        serve; `replicas`, the largest difference of a weight between ranks.
    """
    found: dict[str, Any] = {"losses": [], "norms": [], "events": [], "ratios": [], "b_after": []}
    for step, tokens in enumerate(batches(STEPS)):
        rates = run.set_rates(step, RATES)
        adapters = [p for role, group in run.engine.groups if role == "adapter" for p in group]
        before = [weight.clone() for weight in run.gather(adapters)]
        loss, norm = run.train_step(run.own_share(tokens))
        pairs = zip(run.gather(adapters), before, strict=True)
        changes = [float((new - old).abs().max()) for new, old in pairs]
        event = run.after_step(step + 1)
        found["losses"].append(float(distributed.mean_over_ranks(loss)))
        found["norms"].append(float(norm))
        rate = rates["adapter"]
        found["ratios"].append(max(changes, default=0.0) / rate if rate > 0 else 0.0)
        if event is not None:
            found["events"].append({"step": step + 1, **vars(event)})
            factors = [p for name, p in run.named.items() if name.endswith("lora_B")]
            found["b_after"].append(max(float(b.abs().max()) for b in run.gather(factors)))
    states = run.engine.optimizer.state.values()
    elements = sum(t.numel() for state in states for t in state.values() if t.ndim)
    found["state_elements"] = int(distributed.sum_over_ranks(torch.tensor(elements)))
    found["trained"] = sum(tp_local_shape(p).numel() for p in run.named.values() if p.requires_grad)
    found["replicas"] = run.replicas_differ()
    return found


def eventful(method: str, train: dict[str, object], optimizer: dict[str, object]) -> RunConfig:
    """A run of ten steps with everything that the method ever does."""
    return run_config(
        EVENTFUL[method],
        train={"steps": EVENTFUL_STEPS, **train},
        optimizer={"weight_decay": 0.1, **optimizer},
    )


def train_eventful(run: Training, rates: dict[str, float]) -> dict[str, Any]:
    """All updates of an eventful run.

    Returns:
        `losses` and `norms` per step; `resets`, the share of moments that each event reset;
        `frozen`, how often a vector sat out an update; `gradients_left` after the last one; the
        `measured` bytes of an update and those `expected` of it.
    """
    losses, norms, resets, frozen = [], [], [], 0
    for step, tokens in enumerate(batches(EVENTFUL_STEPS)):
        run.set_rates(step, rates)
        run.before_step(step)
        frozen += sum(int((~clock.live(step)).sum()) for clock in run.engine.clocks.values())
        loss, norm = run.train_step(run.own_share(tokens))
        event = run.after_step(step + 1)
        if event is not None:
            resets.append(event.moments_reset_fraction)
        losses.append(float(distributed.mean_over_ranks(loss)))
        norms.append(float(norm))
    run.check_replicas()  # raises where they differ
    return {
        "losses": losses,
        "norms": norms,
        "resets": resets,
        "frozen": frozen,
        "gradients_left": sum(p.grad is not None for p in run.named.values()),
        "measured": run.measured_memory,
        "expected": run.expected_memory(),
    }


def state_elements(run: Training) -> dict[str, int]:
    """Elements of optimizer state on this rank, its share if ranks had equal ones, and those of the
    largest matrix."""
    tensors = [t for state in run.engine.optimizer.state.values() for t in state.values()]
    tensors += [t for m in run.engine.matrices.by_parameter.values() for t in m.state.values()]
    own = sum(tensor.numel() for tensor in tensors if tensor.ndim)
    total = int(distributed.sum_over_ranks(torch.tensor(own)))
    trained = (p for p in run.named.values() if p.requires_grad)
    largest = max(tp_local_shape(parameter).numel() for parameter in trained)
    return {"own": own, "share": total // run.topology.world_size, "largest": largest}
