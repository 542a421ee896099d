"""Every method under tensor and data parallelism at every ZeRO stage, on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from relora_ds.accounting.recorder import recorder
from relora_ds.accounting.tp_traffic import GroupWork, shares_by_rank, tensor_payloads
from relora_ds.accounting.zero_traffic import expected_payloads
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.methods.build import sharded_meta_model
from relora_ds.model.llama import partial_gradients
from relora_ds.parallel.shape import shard_of, tp_local_shape
from relora_ds.parallel.topology import Topology, share_models
from tests.harness.build import BATCH, CUT, SEQUENCE, STAGES, VOCAB, Training, run_config

STEPS, EVENTS, MICRO = 40, 10, 4
RATES = {"dense": 8e-3, "adapter": 1.2e-2}
_CALM = {"dense": 4e-3, "adapter": 6e-3}
"""For factors of a whole weight, with which a rounding would grow beyond the tolerance."""
_RELORA = {"name": "relora", "rank": 4, "alpha": 6, "merge_every": EVENTS}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": 4, "alpha": 6, "trainable_scaling": True},
    "low_rank": {"name": "low_rank", "rank": 4},
    "relora": _RELORA | {"restart_warmup_steps": 2},
    "relora_random": _RELORA | {"restart_warmup_steps": 2, "reset": {"mode": "random"}},
    "relora_magnitude": _RELORA | {"restart_warmup_steps": 2, "reset": {"mode": "magnitude"}},
    "switchlora": {"name": "switchlora", "rank": 6, "interval": 4, "freeze_steps": 2},
    "sltrain": {"name": "sltrain", "rank": 4, "alpha": 6, "sparsity": 0.1},
    "sltrain_step": {
        "name": "sltrain",
        "rank": 4,
        "alpha": 6,
        "sparsity": 0.1,
        "keep_composed": "step",
        "gradient": "low_rank",
    },
}

Cell = tuple[str, str, int]
"""Method, plan of its factors (`sequence`: cut, and activations too; `bf16`: cut, in bf16; both
recompute activations), ZeRO stage."""

_EVERYWHERE = ("full", "lora", "low_rank", "relora_magnitude", "switchlora", "sltrain")
MATRIX: list[Cell] = [(method, "act", stage) for method in _EVERYWHERE for stage in STAGES]
WHOLE_FACTORS: list[Cell] = [
    ("low_rank", "fold", 0),
    ("lora", "fold", 1),
    ("sltrain", "fold", 2),
    ("switchlora", "fold", 3),
]
CUT_SEQUENCE: list[Cell] = [
    ("full", "sequence", 0),
    ("switchlora", "sequence", 1),
    ("sltrain", "sequence", 2),
    ("relora", "sequence", 3),
]
BF16: list[Cell] = [("relora", "bf16", 1), ("switchlora", "bf16", 3)]
_STAGES = {
    "full": (1,),
    "lora": (0,),
    "low_rank": (2,),
    "relora_magnitude": (0, 3),
    "switchlora": (1, 3),
    "sltrain": (1,),
}
USUAL: list[Cell] = [
    *(cell for cell in MATRIX if cell[2] in _STAGES[cell[0]]),
    ("sltrain_step", "act", 2),
    *WHOLE_FACTORS,
    *CUT_SEQUENCE,
    *BF16,
]
"""What two ranks that share a model run by default: all stages, methods and plans, not all of
their combinations."""
REST: list[Cell] = [
    *(cell for cell in MATRIX if cell not in USUAL),
    ("relora", "act", 1),
    ("relora_random", "act", 3),
    ("relora", "fold", 2),
    ("sltrain", "bf16", 2),
]
ALONE: list[Cell] = [(method, "act", 0) for method in METHODS]
"""What one process runs, which the others are compared with."""


def described(method: str, plan: str, tensor: int) -> RunConfig:
    """A run of 40 steps of which `tensor` ranks share a copy of the model."""
    return run_config(
        METHODS[method],
        train={
            "steps": STEPS,
            "micro_batch_size": MICRO,
            "precision": "bf16" if plan == "bf16" else "fp32",
            "activation_checkpointing": plan in ("sequence", "bf16"),
        },
        # a small eps turns rounding into updates where a gradient is nearly zero
        optimizer={"eps": 1e-3, "weight_decay": 0.1, "clip": 0.3},
        schedule={"warmup_steps": 2},
        parallel={
            "tensor": tensor,
            "low_rank_plan": "fold" if plan == "fold" else "act",
            "sequence": plan == "sequence",
        },
    )


def batch(step: int) -> torch.Tensor:
    """The global batch of an update."""
    draw = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=draw)


def traffic(run: Training) -> dict[str, list[list[Any]]]:
    """Payloads within a copy of the model and between copies, counted and by the closed form."""
    topology, copies = run.topology, run.topology.dp_size
    model = sharded_meta_model(CUT, run.method, run.config.train, topology.tp)
    groups = [group.parameters for group in run.method.parameter_groups(model)]
    held = shares_by_rank(model, groups, run.zero.stage, copies)[topology.dp_rank]
    placements = run.engine.layout.placements
    shares = partial_gradients(run.engine.model)
    assert held == sum(placements[p].stretch.length for p in shares)
    size = topology.tp.size
    work = GroupWork(size, run.engine.update_size, held, len(groups))
    expected = tensor_payloads(model, run.zero, work)
    expected |= expected_payloads(model, groups, run.zero, copies, group="dp", tp_size=size)
    # once per run stage 3 compares over all processes the order of modules that it recorded
    counted = {
        k: v.payload for k, v in recorder.step_volumes().items() if v.payload and k.group != "world"
    }
    both = {"expected": expected, "counted": counted}
    return {name: sorted([*kind, sent] for kind, sent in of.items()) for name, of in both.items()}


def desync(run: Training) -> str:
    """What the digest says when one tensor-parallel rank changes by one bit what all hold alike:
    a factor, or a norm if the factors are cut."""
    if run.topology.rank == 1:
        alike = [
            p
            for name, p in reversed(run.named.items())
            if p.requires_grad and shard_of(p) is None and ("lora" in name or "norm" in name)
        ]
        factor = max(alike, key=lambda p: len(tp_local_shape(p)))
        run.engine.layout.placements[factor].master().view(torch.int32)[0] += 1
        run.engine.layout.working(factor)[1].view(torch.int32)[0] += 1
    return run.desync()


def train(run: Training) -> dict[str, Any]:
    """All updates; the figures that tests assert on."""
    found: dict[str, Any] = {"losses": [], "norms": [], "events": [], "traffic": None}
    for step in range(STEPS):
        run.set_rates(step, _CALM if run.config.method.name == "low_rank" else RATES)
        run.before_step(step)
        recorder.begin_step()
        loss, norm = run.train_step(run.own_share(batch(step)))
        if run.topology.tp.size > 1 and step == 1:
            found["traffic"] = traffic(run)
        event = run.after_step(step + 1)
        found["losses"].append(float(distributed.mean_over_ranks(loss)))
        found["norms"].append(float(norm))
        if event is not None:
            found["events"].append([event.kind, event.moments_reset_fraction, event.function_drift])
    run.check_replicas()
    figures = run.metrics()
    found["switched"] = figures.get("method/switched_vectors", 0)
    found["rank"] = figures.get("method/effective_rank", 0.0)
    return found


@torch.no_grad()
def whole(run: Training, parameter: nn.Parameter) -> torch.Tensor:
    """A parameter put together from all ranks."""
    (part,), shard = run.gather([parameter]), shard_of(parameter)
    if shard is None:
        return part.clone()
    full = torch.zeros(shard.global_shape)
    shard.place(part, full)
    return run.topology.tp.sum(full)


def figures(world: Topology, cells: Sequence[Cell], tensor: int) -> dict[str, dict[str, Any]]:
    """What every cell found, and its whole parameters.

    Args:
        world: all ranks.
        cells: what to run.
        tensor: how many ranks share a copy of the model.
    """
    found = {}
    with recorder:
        for method, plan, stage in cells:
            config = described(method, plan, tensor)
            topology = share_models(world, config)
            for name, group in (("tp", topology.tp.group), ("dp", topology.tp.data_group)):
                if group is not None:
                    recorder.name_group(group, name)
            zero = {"stage": stage, "reduce_bucket_size": 10_000}
            run = Training(config, topology, zero, CUT, probe=batch(0)[:1, :-1])
            each = train(run)
            each["parameters"] = {name: whole(run, p) for name, p in run.named.items()}
            if tensor == world.world_size > 1 and (plan == "fold" or method == "switchlora"):
                each["desync"] = desync(run)
            found[f"{method}/{plan}/{stage}"] = each
            run.destroy()
    return found
