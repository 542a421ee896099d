"""Every method under tensor and data parallelism at every ZeRO stage, as many ranks as started.

Run by `test_tensor.py`; rank 0 writes figures and whole parameters, which must not depend on how
the run is cut.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relora_ds.accounting.recorder import recorder
from relora_ds.accounting.tp_traffic import GroupWork, shares_by_rank, tensor_payloads
from relora_ds.accounting.zero_traffic import expected_payloads
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.deepspeed.partition import build_partitioner
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import DesyncError
from relora_ds.methods.build import build_model, sharded_meta_model
from relora_ds.methods.registry import Phase, plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.model.llama import partial_gradients
from relora_ds.parallel.shape import shard_of, tp_local_shape
from relora_ds.parallel.topology import Topology, share_models
from relora_ds.parallel.zero import ZeroSettings

STAGES = (0, 1, 2, 3)
STEPS, EVENTS = 40, 10
BATCH, MICRO, SEQUENCE, VOCAB = 8, 4, 12, 61
# neither the vocabulary nor the width of the MLP divides by two
ARCHITECTURE = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=41,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=32,
    initializer_range=0.1,
    attention_bias=True,
)
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
    ("relora_random", "act", 3),
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
    ("relora", "fold", 2),
    ("sltrain", "bf16", 2),
]


def run_config(method: str, plan: str, tensor: int = 1) -> RunConfig:
    return RunConfig.model_validate_json(
        json.dumps(
            {
                "output_dir": "unused",
                "model": "unused",
                "deepspeed": "unused",
                "method": METHODS[method],
                "train": {
                    "steps": STEPS,
                    "seq_length": SEQUENCE,
                    "micro_batch_size": MICRO,
                    "global_batch_size": BATCH,
                    "precision": "bf16" if plan == "bf16" else "fp32",
                    "activation_checkpointing": plan in ("sequence", "bf16"),
                },
                # a small eps turns rounding into updates where a gradient is nearly zero
                "optimizer": {"eps": 1e-3, "weight_decay": 0.1, "clip": 0.3},
                "schedule": {"warmup_steps": 2},
                "parallel": {
                    "tensor": tensor,
                    "low_rank_plan": "fold" if plan == "fold" else "act",
                    "sequence": plan == "sequence",
                },
            }
        )
    )


def batch(step: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=draw)


def build(
    stage: int, config: RunConfig, topology: Topology
) -> tuple[Phase, TrainEngine, ZeroSettings]:
    phase, tp = plan_phases(config)[-1], topology.tp
    draw = InitialWeights(ARCHITECTURE, config.train.seed)
    source = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 10_000}}
    resolved = resolve_deepspeed_config(source, config, topology.dp_size)
    partitioner = build_partitioner(resolved, tp=tp)
    device, method = topology.device, phase.method
    model = build_model(ARCHITECTURE, method, config.train, draw, device, partitioner, tp)

    @torch.no_grad()
    def probe() -> torch.Tensor:
        return model.logits(batch(0)[:1, :-1]).float()

    exact = None if partitioner is None else partitioner.finish()
    engine = TrainEngine(model, method, config, resolved, probe, exact, tp)
    return phase, engine, resolved


def traffic(
    engine: TrainEngine, config: RunConfig, resolved: ZeroSettings, topology: Topology
) -> dict[str, list[list[Any]]]:
    """Payloads within a copy of the model and between copies, counted and by the closed form."""
    method, copies = plan_phases(config)[-1].method, topology.dp_size
    model = sharded_meta_model(ARCHITECTURE, method, config.train, topology.tp)
    groups = [group.parameters for group in method.parameter_groups(model)]
    held = shares_by_rank(model, groups, resolved.stage, copies)[topology.dp_rank]
    placements = engine.layout.placements
    shares = partial_gradients(engine.model)
    assert held == sum(placements[p].stretch.length for p in shares)
    size = topology.tp.size
    work = GroupWork(size, MICRO * SEQUENCE, held, len(groups))
    expected = tensor_payloads(model, resolved, work)
    expected |= expected_payloads(model, groups, resolved, copies, group="dp", tp_size=size)
    # once per run stage 3 compares over all processes the order of modules that it recorded
    counted = {
        k: v.payload for k, v in recorder.step_volumes().items() if v.payload and k.group != "world"
    }
    both = {"expected": expected, "counted": counted}
    return {name: sorted([*kind, sent] for kind, sent in of.items()) for name, of in both.items()}


def desync(engine: TrainEngine, topology: Topology) -> str:
    """What the digest says when one tensor-parallel rank changes by one bit what all hold alike:
    a factor, or a norm if the factors are cut."""
    if topology.rank == 1:
        named = reversed(list(engine.model.named_parameters()))
        alike = [
            p
            for name, p in named
            if p.requires_grad and shard_of(p) is None and ("lora" in name or "norm" in name)
        ]
        factor = max(alike, key=lambda p: len(tp_local_shape(p)))
        engine.layout.placements[factor].master().view(torch.int32)[0] += 1
        engine.layout.working(factor)[1].view(torch.int32)[0] += 1
    try:
        engine.check_replicas()
    except DesyncError as error:
        return str(error)
    return ""


def train(
    phase: Phase,
    engine: TrainEngine,
    config: RunConfig,
    resolved: ZeroSettings,
    topology: Topology,
) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": [], "norms": [], "events": [], "traffic": None}
    with torch.no_grad():
        phase.method.attach(engine.state, engine.model)
    for step in range(STEPS):
        factor = phase.method.lr_multiplier(step, phase.schedule)
        engine.set_learning_rates({"dense": factor * 8e-3, "adapter": factor * 1.2e-2})
        with torch.no_grad():
            phase.method.before_step(engine.state, engine.model, step)
        recorder.begin_step()
        tokens = batch(step)
        starts = range(topology.dp_rank * MICRO, BATCH, MICRO * topology.dp_size)
        loss, norm = engine.train_step([tokens[at : at + MICRO] for at in starts])
        if topology.tp.size > 1 and step == 1:
            found["traffic"] = traffic(engine, config, resolved, topology)
        with torch.no_grad():
            event = phase.method.after_step(engine.state, engine.model, step + 1)
        found["losses"].append(float(distributed.mean_over_ranks(loss.clone())))
        found["norms"].append(float(norm))
        if event is not None:
            found["events"].append([event.kind, event.moments_reset_fraction, event.function_drift])
    engine.check_replicas()
    with torch.no_grad():
        figures = phase.method.figures(engine.state, engine.model)
    found["switched"] = figures.get("method/switched_vectors", 0)
    found["rank"] = figures.get("method/effective_rank", 0.0)
    return found


@torch.no_grad()
def whole(engine: TrainEngine, parameter: nn.Parameter, topology: Topology) -> torch.Tensor:
    """A parameter put together from all ranks."""
    part, shard = engine.layout.gather([parameter])[0].float(), shard_of(parameter)
    if shard is None:
        return part.clone()
    full = torch.zeros(shard.global_shape)
    shard.place(part, full)
    return topology.tp.sum(full)


def cells(world: Topology, tensor: int, rest: bool) -> list[Cell]:
    """Everything that this many ranks run."""
    if world.world_size == 1:
        return [(method, "act", 0) for method in METHODS]
    if tensor != world.world_size:
        return MATRIX
    return REST if rest else USUAL


def main(output: Path, tensor: int = 2, rest: bool = False) -> None:
    """Run all cells; copies of the model are spread over `tensor` ranks each."""
    world = distributed.start(5.0)
    recorder.start()
    figures: dict[str, Any] = {}
    parameters: dict[str, dict[str, torch.Tensor]] = {}
    size = min(tensor, world.world_size)
    for method, plan, stage in cells(world, size, rest):
        config = run_config(method, plan, size)
        topology = share_models(world, config)
        for name, group in (("tp", topology.tp.group), ("dp", topology.tp.data_group)):
            if group is not None:
                recorder.name_group(group, name)
        phase, engine, resolved = build(stage, config, topology)
        cell = f"{method}/{plan}/{stage}"
        figures[cell] = train(phase, engine, config, resolved, topology)
        named = engine.model.named_parameters()
        parameters[cell] = {name: whole(engine, p, topology) for name, p in named}
        if size == world.world_size > 1 and (plan == "fold" or method == "switchlora"):
            figures[cell]["desync"] = desync(engine, topology)
        engine.destroy()
    if world.is_main:
        torch.save(parameters, output.with_suffix(".pt"))
        output.write_text(json.dumps(figures))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
