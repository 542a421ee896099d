"""What stage 3 promises beyond equal losses, on two ranks: memory, traffic, copies, hand-over."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

from relora_ds.accounting.recorder import recorder
from relora_ds.engine import distributed
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.deepspeed.partition import build_partitioner
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import DesyncError
from relora_ds.methods.build import build_model
from relora_ds.methods.interface import projection_layers
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.parallel.shape import tp_local_shape
from relora_ds.parallel.topology import Topology
from relora_ds.train.transition import take_dense_weights
from tests.distributed import relora_worker as base

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "none_persists": {"stage3_param_persistence_threshold": 0},
    "all_persist": {"stage3_param_persistence_threshold": 100_000},
    "small_sub_groups": {"stage3_param_persistence_threshold": 0, "sub_group_size": 100},
    "offload": {
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}


def losses(variant: str, topology: Topology) -> dict[str, Any]:
    """A short run, without a probe: forward passes between steps keep copies from persisting."""
    config = base.run_config(3, base.RESETS["random"], "fp32")
    phase, engine = base.build(3, config, topology, **VARIANTS[variant])
    engine.state._probe = lambda: None
    found: dict[str, Any] = {"losses": [], "merge_bytes": []}
    for step, tokens in enumerate(base.batches()):
        factor = phase.method.lr_multiplier(step, phase.schedule)
        engine.set_learning_rates({"dense": factor * 2e-2, "adapter": factor * 3e-2})
        loss, _ = engine.train_step(base.own_share(tokens, topology))
        found["losses"].append(float(distributed.mean_over_ranks(loss)))
        factors = [
            p for layer in projection_layers(engine.model).values() for p in layer.parameters()
        ]
        found["copies"] = sum(p.data.numel() == tp_local_shape(p).numel() for p in factors)
        with torch.no_grad():
            event = phase.method.after_step(engine.state, engine.model, step + 1)
        if event is not None:
            found["merge_bytes"].append(event.details["method/merge_bytes"])
    engine.check_replicas()
    layers = projection_layers(engine.model).values()
    found["layers"] = len(layers)
    found["factor_bytes"] = sum(
        4 * tp_local_shape(p).numel() for layer in layers for p in (layer.lora_A, layer.lora_B)
    )
    engine.destroy()
    return found


def wire(topology: Topology) -> dict[str, float]:
    """Bytes of one merge as the recorder of all collectives sees them."""
    phase, engine = base.build(
        3, base.run_config(3, base.RESETS["zero"], "bf16"), topology, **VARIANTS["none_persists"]
    )
    engine.state._probe = lambda: None
    for tokens in base.batches()[: base.MERGE_EVERY]:
        engine.set_learning_rates({"dense": 2e-2, "adapter": 3e-2})
        engine.train_step(base.own_share(tokens, topology))
    recorder.reset()
    with recorder, torch.no_grad():
        event = phase.method.after_step(engine.state, engine.model, base.MERGE_EVERY)
    assert event is not None
    layers = projection_layers(engine.model).values()
    factors = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
    counted = sum(volume.payload for volume in recorder.volumes().values())
    gathers = [v.calls for k, v in recorder.volumes().items() if k.operation == "all_gather"]
    engine.destroy()
    return {
        "gathers": sum(gathers),
        "counted": counted,
        "reported": event.details["method/merge_bytes"] + event.details["method/reset_bytes"],
        "factor_bytes": sum(2 * tp_local_shape(p).numel() for p in factors),
        "layers": len(layers),
    }


def contract(stage: int, topology: Topology) -> dict[str, bool]:
    """A pattern written through `TrainState`, read back through DeepSpeed's public functions."""
    _, engine = base.build(stage, base.run_config(stage, base.RESETS["zero"], "fp32"), topology)
    engine.set_learning_rates({"dense": 0.0, "adapter": 0.0})
    engine.train_step(base.own_share(base.batches()[0], topology))
    found = {}
    for name, parameter in engine.model.named_parameters():
        if parameter not in engine.layout.placements:
            continue
        shape = tp_local_shape(parameter)
        pattern = torch.arange(shape.numel(), dtype=torch.float32).view(shape) * 1e-3 + len(found)
        engine.state.write(parameter, pattern)
        found[name] = torch.equal(safe_get_full_fp32_param(parameter), pattern)
        found[name] &= torch.equal(base.whole(engine, parameter), pattern)
        if stage == 3:  # below, 0.19.8 loses all groups but the first
            shard = engine.state.moments(parameter)
            if shard is not None:
                end = shard.start + shard.exp_avg.numel()
                shard.exp_avg.copy_(pattern.view(-1)[shard.start : end])
            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
            found[name] &= moment is not None and torch.equal(moment, pattern)
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] &= torch.equal(parameter.data, pattern)
    engine.destroy()
    return found


def digest(stage: int, topology: Topology) -> dict[str, str]:
    """One unit in the last place, changed on rank 1 only: what is reported."""
    _, engine = base.build(stage, base.run_config(stage, base.RESETS["zero"], "bf16"), topology)
    engine.set_learning_rates({"dense": 1e-2, "adapter": 1e-2})
    engine.train_step(base.own_share(base.batches()[0], topology))
    engine.check_replicas()
    names = {n: p for n, p in engine.model.named_parameters() if "layers.1.mlp.up_proj" in n}
    found = {}
    for name, parameter in names.items():
        targets = {"": engine.layout.working(parameter)[1]}
        if parameter in engine.bases:
            targets |= engine.bases[parameter].tensors()
        for key, tensor in targets.items():
            bits = tensor.view(torch.int16)
            bits[3] ^= topology.dp_rank == 1
            found[f"{name}{key and f' ({key})'}"] = problem(engine)
            bits[3] ^= topology.dp_rank == 1
    engine.check_replicas()
    engine.destroy()
    return found


def problem(engine: TrainEngine) -> str:
    try:
        engine.check_replicas()
    except DesyncError as error:
        return str(error)
    return ""


def transition(topology: Topology) -> dict[str, Any]:
    """A warm start of two steps handed over to ReLoRA at stage 3."""
    config = base.run_config(3, base.RESETS["zero"], "bf16", warm_start_steps=2)
    resolved = resolve_deepspeed_config({"zero_optimization": {"stage": 3}}, config, 2)
    first, second = plan_phases(config)
    draw = InitialWeights(base.ARCHITECTURE, config.train.seed)
    build = (base.ARCHITECTURE, first.method, config.train, draw, topology.device)
    partitioner = build_partitioner(resolved)
    assert partitioner is not None
    engine = TrainEngine(
        build_model(*build, partitioner),
        first.method,
        config,
        resolved,
        lambda: None,
        partitioner.finish(),
    )
    engine.set_learning_rates({"dense": 1e-2, "adapter": 1e-2})
    for tokens in base.batches()[:2]:
        engine.train_step(base.own_share(tokens, topology))
    old = weakref.ref(engine.model)
    before = {
        n: engine.layout.placements[p].master().clone() for n, p in engine.model.named_parameters()
    }
    recorder.reset()
    with recorder:
        slices = take_dense_weights(
            engine, base.ARCHITECTURE, first.method, config.train, topology.tp
        )
        moved = sum(volume.payload for volume in recorder.volumes().values())
    del engine
    gc.collect()
    partitioner = build_partitioner(resolved, slices)
    assert partitioner is not None
    with recorder:
        model = build_model(
            base.ARCHITECTURE,
            second.method,
            config.train,
            slices.rest,
            topology.device,
            partitioner,
        )
        moved += sum(volume.payload for volume in recorder.volumes().values())
    engine = TrainEngine(model, second.method, config, resolved, lambda: None, partitioner.finish())
    error = hand_over_error(engine, before, topology)
    engine.destroy()
    return {"freed": old() is None, "moved": moved, "error": error}


@torch.no_grad()
def hand_over_error(
    engine: TrainEngine, before: dict[str, torch.Tensor], topology: Topology
) -> float:
    """Largest difference of the dense model's fp32 slices before and after, on this rank."""
    worst = 0.0
    for name, parameter in engine.model.named_parameters():
        start, working = engine.layout.working(parameter)
        if name.endswith("_proj.weight"):
            layer = engine.model.get_submodule(name.removesuffix(".weight"))
            lora_b, lora_a = engine.layout.gather([layer.lora_B, layer.lora_A])
            product = layer.scale * (lora_b.float() @ lora_a.float()).view(-1)
            now = engine.bases[parameter].load(working, 0) + product[start : start + len(working)]
        elif parameter in engine.layout.placements and "lora_" not in name:
            now = engine.layout.placements[parameter].master()
        else:
            continue
        worst = max(worst, float((now - before[name]).abs().max()))
    return worst


def memory(topology: Topology) -> dict[str, int]:
    """Most fp32 elements that are alive at once while a model is cut as it is built."""
    config = base.run_config(3, base.RESETS["zero"], "bf16")
    resolved = resolve_deepspeed_config({"zero_optimization": {"stage": 3}}, config, 2)
    phase = plan_phases(config)[-1]
    draw = InitialWeights(base.ARCHITECTURE, config.train.seed)
    partitioner = build_partitioner(resolved)
    assert partitioner is not None
    gc.collect()
    start, peak = alive(), 0

    def watched(name: str, parameter: nn.Parameter) -> None:
        nonlocal peak
        peak = max(peak, alive() - start)
        partitioner(name, parameter)

    model = build_model(
        base.ARCHITECTURE, phase.method, config.train, draw, topology.device, watched
    )
    shapes = [tp_local_shape(p).numel() for p in model.parameters()]
    return {"peak": peak, "whole": sum(shapes), "largest": max(shapes)}


def alive() -> int:
    """Elements of all live fp32 tensors with memory of their own."""
    seen = {}
    for thing in gc.get_objects():
        if type(thing) not in (torch.Tensor, nn.Parameter) or thing.is_meta:
            continue
        if thing.dtype == torch.float32:
            seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes() // 4
    return sum(seen.values())


def main(output: Path) -> None:
    topology = distributed.start(5.0)
    figures: dict[str, Any] = {"memory": memory(topology)}
    figures["losses"] = {variant: losses(variant, topology) for variant in VARIANTS}
    figures["wire"] = wire(topology)
    figures["contract"] = {stage: contract(stage, topology) for stage in (1, 2, 3)}
    figures["digest"] = {stage: digest(stage, topology) for stage in (0, 1, 2, 3)}
    figures["transition"] = transition(topology)
    if topology.is_main:
        output.write_text(json.dumps(figures))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
