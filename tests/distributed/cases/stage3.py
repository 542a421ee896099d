"""What stage 3 promises beyond equal losses: memory, traffic, copies, hand-over."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import deepspeed
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

from relora_ds.accounting.recorder import recorder
from relora_ds.engine import distributed
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.deepspeed.layouts import PartitionedParameters
from relora_ds.engine.deepspeed.partition import build_partitioner
from relora_ds.methods.build import build_model
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.parallel.shape import tp_local_shape
from relora_ds.parallel.topology import Topology
from relora_ds.train.transition import take_dense_weights
from tests.harness.build import STAGES, TINY, Training, batches
from tests.harness.runs import MERGE_EVERY, RATES, SMALL_BUCKETS, STEPS, relora

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


def start(
    topology: Topology, reset: str, precision: str, stage: int = 3, **zero: object
) -> Training:
    """A run without a probe: forward passes between steps keep copies from persisting."""
    config = relora(reset, precision)
    return Training(config, topology, {"stage": stage, **SMALL_BUCKETS, **zero})


def losses(topology: Topology, variant: str) -> dict[str, Any]:
    """A short run: its losses, what merges moved, and how many whole copies were left."""
    run = start(topology, "random", "fp32", **VARIANTS[variant])
    found: dict[str, Any] = {"losses": [], "merge_bytes": []}
    held = [p for layer in run.layers for p in layer.parameters()]
    for step, tokens in enumerate(batches(STEPS)):
        run.set_rates(step, RATES)
        loss, _ = run.train_step(run.own_share(tokens))
        found["losses"].append(float(distributed.mean_over_ranks(loss)))
        found["copies"] = sum(p.data.numel() == tp_local_shape(p).numel() for p in held)
        event = run.after_step(step + 1)
        if event is not None:
            found["merge_bytes"].append(event.details["method/merge_bytes"])
    run.check_replicas()
    found |= {"layers": len(run.layers), "factor_bytes": 4 * _factor_elements(run)}
    run.destroy()
    return found


def _factor_elements(run: Training) -> int:
    factors = [p for layer in run.layers for p in (layer.lora_A, layer.lora_B)]
    return sum(tp_local_shape(p).numel() for p in factors)


def wire(topology: Topology) -> dict[str, float]:
    """Bytes of one merge as the recorder of all collectives sees them."""
    run = start(topology, "zero", "bf16", **VARIANTS["none_persists"])
    for tokens in batches(MERGE_EVERY):
        run.engine.set_learning_rates(RATES)
        run.train_step(run.own_share(tokens))
    recorder.reset()
    with recorder:
        event = run.after_step(MERGE_EVERY)
    assert event is not None
    counted = sum(volume.payload for volume in recorder.volumes().values())
    gathers = [v.calls for k, v in recorder.volumes().items() if k.operation == "all_gather"]
    found = {
        "gathers": sum(gathers),
        "counted": counted,
        "reported": event.details["method/merge_bytes"] + event.details["method/reset_bytes"],
        "factor_bytes": 2 * _factor_elements(run),
        "layers": len(run.layers),
    }
    run.destroy()
    return found


def contract(topology: Topology, stage: int) -> dict[str, bool]:
    """A pattern written through `TrainState`, read back through DeepSpeed's public functions."""
    run = start(topology, "zero", "fp32", stage)
    run.engine.set_learning_rates({"dense": 0.0, "adapter": 0.0})
    run.train_step(run.own_share(batches(1)[0]))
    found = {}
    for name, parameter in run.named.items():
        if parameter in run.engine.layout.placements:
            found[name] = _is_read_back(run, parameter, len(found), stage)
    run.destroy()
    return found


@torch.no_grad()
def _is_read_back(run: Training, parameter: nn.Parameter, number: int, stage: int) -> bool:
    shape = tp_local_shape(parameter)
    pattern = torch.arange(shape.numel(), dtype=torch.float32).view(shape) * 1e-3 + number
    run.engine.state.weights.write(parameter, pattern)
    read = [safe_get_full_fp32_param(parameter), *run.gather([parameter])]
    if stage == 3:  # below, 0.19.8 loses all groups but the first
        shard = run.engine.state.moments.shard(parameter)
        if shard is not None:
            end = shard.start + shard.exp_avg.numel()
            shard.exp_avg.copy_(pattern.view(-1)[shard.start : end])
        read.append(safe_get_full_optimizer_state(parameter, "exp_avg"))
        with deepspeed.zero.GatheredParameters([parameter]):
            read.append(parameter.data.clone())
    return all(value is not None and torch.equal(value, pattern) for value in read)


def digest(topology: Topology, stage: int) -> dict[str, str]:
    """One unit in the last place, changed on rank 1 only: what is reported."""
    run = start(topology, "zero", "bf16", stage)
    run.engine.set_learning_rates({"dense": 1e-2, "adapter": 1e-2})
    run.train_step(run.own_share(batches(1)[0]))
    run.check_replicas()
    found = {}
    for name, parameter in run.named.items():
        if "layers.1.mlp.up_proj" not in name:
            continue
        targets = {"": run.engine.layout.working(parameter)[1]}
        if parameter in run.engine.bases:
            targets |= run.engine.bases[parameter].tensors()
        for key, tensor in targets.items():
            bits = tensor.view(torch.int16)
            bits[3] ^= topology.dp_rank == 1
            found[f"{name}{key and f' ({key})'}"] = run.desync()
            bits[3] ^= topology.dp_rank == 1
    run.check_replicas()
    run.destroy()
    return found


def transition(topology: Topology) -> dict[str, Any]:
    """A warm start of two steps handed over to ReLoRA."""
    config = relora("zero", "bf16", warm_start_steps=2)
    first = Training(config, topology, {"stage": 3}, phase=0)
    first.engine.set_learning_rates({"dense": 1e-2, "adapter": 1e-2})
    for tokens in batches(2):
        first.train_step(first.own_share(tokens))
    old = weakref.ref(first.engine.model)
    placements = first.engine.layout.placements
    before = {n: placements[p].master().clone() for n, p in first.named.items()}
    del placements
    moved: list[int] = []

    def count(_: nn.Module) -> None:
        moved.append(sum(volume.payload for volume in recorder.volumes().values()))

    recorder.reset()
    with recorder:
        slices = take_dense_weights(first.engine, TINY, first.method, config.train, topology.tp)
        del first
        gc.collect()
        second = Training(config, topology, {"stage": 3}, weights=slices, prepare=count)
    error = hand_over_error(second, before)
    second.destroy()
    return {"freed": old() is None, "moved": sum(moved), "error": error}


@torch.no_grad()
def hand_over_error(run: Training, before: Mapping[str, torch.Tensor]) -> float:
    """Largest difference of the dense model's fp32 slices before and after, on this rank."""
    engine, worst = run.engine, 0.0
    layers = {f"{layer.spec.name}.weight": layer for layer in run.layers}
    for name, parameter in run.named.items():
        start, working = engine.layout.working(parameter)
        if name in layers:
            layer = layers[name]
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
    config = relora("zero", "bf16")
    resolved = resolve_deepspeed_config({"zero_optimization": {"stage": 3}}, config, 2)
    method = plan_phases(config)[-1].method
    draw = InitialWeights(TINY, config.train.seed)
    partitioner = build_partitioner(resolved)
    assert partitioner is not None
    gc.collect()
    start, peak = alive(), 0

    def watched(name: str, parameter: nn.Parameter) -> None:
        nonlocal peak
        peak = max(peak, alive() - start)
        partitioner(name, parameter)

    model = build_model(TINY, method, config.train, draw, topology.device, watched)
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


def figures(topology: Topology) -> dict[str, Any]:
    """All of it."""
    return {
        "memory": memory(topology),
        "losses": {variant: losses(topology, variant) for variant in VARIANTS},
        "wire": wire(topology),
        "contract": {stage: contract(topology, stage) for stage in (1, 2, 3)},
        "digest": {stage: digest(topology, stage) for stage in STAGES},
        "transition": transition(topology),
    }


def stream_order(topology: Topology) -> list[str]:
    """What happens between the last backward pass of a merge's update and the next step, on an
    accelerator whose gathers run on a stream of their own: edits, waits of that stream, gathers."""
    run = start(topology, "zero", "fp32", stage3_param_persistence_threshold=0)
    order: list[str] = []
    layout = run.engine.layout
    assert isinstance(layout, PartitionedParameters)
    offload = cast(Any, layout._wrapper.parameter_offload)

    def note(event: str) -> None:
        if not order or order[-1] != event:
            order.append(event)

    def noting(event: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **named: Any) -> Any:
            note(event)
            return call(*arguments, **named)

        return noted

    coordinator: Any = PartitionedParameterCoordinator
    assert hasattr(offload, "_DeepSpeedZeRoOffload__allgather_stream"), "DeepSpeed renamed it"
    layout.drop_copies = noting("edit", layout.drop_copies)
    layout.write_copies = noting("edit", layout.write_copies)
    fetch = coordinator.fetch_sub_module
    offload._DeepSpeedZeRoOffload__allgather_stream = SimpleNamespace(
        wait_stream=lambda current: note("wait")
    )
    try:
        coordinator.fetch_sub_module = noting("gather", fetch)
        for step, tokens in enumerate(batches(2 * MERGE_EVERY + 1)):
            run.update(step, tokens, RATES)
    finally:
        coordinator.fetch_sub_module = fetch
        offload._DeepSpeedZeRoOffload__allgather_stream = None
    run.destroy()
    return order
