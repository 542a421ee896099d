"""Bytes of one training step in closed form, as DeepSpeed 0.19.8 moves them. Pure.

T is the number of trained elements, P the same with every optimizer group padded to a multiple of
2 x dp, R the same with every parameter padded to a multiple of dp, g and w the bytes of an element
on the way of gradients and of weights, k the micro-batches of an update:

| stage | gradients             | weights             | scalars                               |
|-------|-----------------------|---------------------|---------------------------------------|
| 0     | all-reduce g T        | -                   | one norm if fp32 and clipped          |
| 1     | all-reduce g T        | all-gather w P      | a norm per group; bf16: a flag        |
| 2     | all-reduce k g T      | all-gather w P      | a norm per group; bf16: a flag        |
| 3     | reduce-scatter k g R  | all-gathers, below  | a norm per sub-group, 8 bytes         |

Gradients below stage 3 are not padded, and buckets split them without adding to them. Frozen
weights never move there: that is the whole saving of a low-rank method. With
`train.gradient_reduction: step` k is 1 at stages 2 and 3 as well. A norm is one fp32 below stage 3,
the flag (whether a bf16 gradient overflowed) one byte.

At stage 3 every weight, frozen or not, is gathered about twice per micro-batch, three times where
layers are recomputed: `gathers` replays which. The frozen base of a low-rank method travels with
the rest, so that stage 3 moves more than in full rank. With hpZ it travels within a node only.

Payload and wire bytes mean what they do in `collectives`. Events (a merge, a switch) come on top
and are small: DeepSpeed knows nothing of them. At stage 3 the first micro-batch of a run, and the
first after an evaluation or an event's probe, is recorded anew and moves more than the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from relora_ds.accounting.recorder import StepBytes, Traffic, Volume, total
from relora_ds.accounting.zero3_gathers import Replay, gathered

_BYTES = {"float32": 4, "bfloat16": 2}
_NORM_BYTES = 4
_NORM_BYTES_STAGE_3 = 8
_FLAG_BYTES = 1
# DeepSpeed aligns every rank's part of a group to the 4 bytes that NCCL wants, for 2-byte elements
_ALIGNMENT = 2
_SUB_GROUP = 1_000_000_000

# Options of stage 3 that change what is moved in ways that are not replayed
_NOT_REPLAYED = {
    "reduce_scatter": True,
    "stage3_use_all_reduce_for_fetch_params": False,
    "stage3_module_granularity_threshold": 0,
    "stage3_model_persistence_threshold": None,
    "enable_sanity_checks": False,
    "offload_optimizer": None,
    "offload_param": None,
}

HPZ_GROUP = "hpz"
"""The recorder's name of the group that holds one copy of the weights under hpZ."""

Payloads = dict[Traffic, int]
"""Payload bytes of a step by kind of collective, as the recorder keeps them."""


def expected_payloads(
    model: nn.Module,
    groups: Sequence[Sequence[nn.Parameter]],
    resolved: Mapping[str, Any],
    dp_size: int,
    *,
    once: bool = False,
    group: str = "world",
    tp_size: int = 1,
    replay: Replay | None = None,
) -> Payloads:
    """What one update moves, from its first forward pass to the end of the optimizer's step.

    Args:
        model: a `Llama` in training mode on the meta device.
        groups: its trained parameters by optimizer group.
        resolved: output of `resolve_deepspeed_config`.
        dp_size: data-parallel processes.
        once: gradients are reduced once per update at every stage.
        group: the recorder's name of the processes' group.
        tp_size: processes that share a copy of the model.
        replay: what `gathered` returned for them, where it is known already.

    Raises:
        ValueError: an option of stage 3 is set that makes the figure inexact.
    """
    if int(resolved["zero_optimization"]["stage"]) < 3:
        elements = [sum(p.numel() for p in parameters) for parameters in groups]
        return step_payloads(elements, resolved, dp_size, once=once, group=group)
    moved = _stage3_payloads(groups, resolved, dp_size, once, group)
    if dp_size > 1:
        zero, steps = resolved["zero_optimization"], int(resolved["gradient_accumulation_steps"])
        found = replay or gathered(model, zero, dp_size, steps, tp_size)
        moved |= _gather_payloads(found, resolved, (group, dp_size))
    return moved


def _stage3_payloads(
    groups: Sequence[Sequence[nn.Parameter]],
    resolved: Mapping[str, Any],
    dp_size: int,
    once: bool,
    group: str,
) -> Payloads:
    zero = resolved["zero_optimization"]
    for key, value in _NOT_REPLAYED.items():
        if zero.get(key, value) != value:
            raise ValueError(
                f"zero_optimization.{key} is {zero[key]!r}, which has no closed form at stage 3: "
                "remove it, or measure with benchmarks/communication.py"
            )
    steps = int(resolved["gradient_accumulation_steps"])
    working = "bfloat16" if resolved["bf16"]["enabled"] else "float32"
    gradients = _gradient_type(resolved, working)
    sizes = [[-(-p.numel() // dp_size) for p in parameters] for parameters in groups]
    reduced = dp_size * sum(map(sum, sizes)) * (1 if once else steps)
    norms = sum(_sub_groups(each, int(zero.get("sub_group_size", _SUB_GROUP))) for each in sizes)
    found = {
        ("reduce_scatter", group, dp_size, gradients, "backward"): reduced * _BYTES[gradients],
        ("all_reduce", group, dp_size, "float64", "step"): norms * _NORM_BYTES_STAGE_3,
    }
    return {Traffic(*kind): payload for kind, payload in found.items() if payload}


def _gather_payloads(
    replay: Replay, resolved: Mapping[str, Any], everyone: tuple[str, int]
) -> Payloads:
    near = (HPZ_GROUP, int(resolved["zero_optimization"].get("zero_hpz_partition_size", 1)))
    working = "bfloat16" if resolved["bf16"]["enabled"] else "float32"
    return {
        Traffic("all_gather", *(near if gather.near else everyone), working, gather.phase): (
            elements * _BYTES[working]
        )
        for gather, elements in replay.elements.items()
        if elements
    }


def _sub_groups(partitions: Sequence[int], limit: int) -> int:
    """Flat tensors that DeepSpeed cuts an optimizer group into, given its parameters' slices."""
    if limit >= sum(partitions):
        return 1
    count = held = 0
    for number, size in enumerate(partitions, 1):
        held += size
        if held >= limit or number == len(partitions):
            count, held = count + 1, 0
    return count


def step_payloads(
    group_elements: Sequence[int],
    resolved: Mapping[str, Any],
    dp_size: int,
    *,
    once: bool = False,
    group: str = "world",
) -> Payloads:
    """What one update moves at stages 0 to 2, where numbers of elements are enough to know it.

    Args:
        group_elements: trained elements per optimizer group.
        resolved: output of `resolve_deepspeed_config`.
        dp_size: data-parallel processes.
        once: gradients are reduced once per update at stage 2 as well.
        group: the recorder's name of the processes' group.

    Raises:
        ValueError: the stage is not 0, 1 or 2.
    """
    zero = resolved["zero_optimization"]
    stage, clips = int(zero["stage"]), resolved["gradient_clipping"] > 0
    if stage not in (0, 1, 2):
        raise ValueError(f"stage {stage} needs the model's order: call expected_payloads")
    bf16 = bool(resolved["bf16"]["enabled"])
    working = "bfloat16" if bf16 else "float32"
    moved: Payloads = {}

    def add(operation: str, dtype: str, phase: str, payload: int) -> None:
        if payload:
            moved[Traffic(operation, group, dp_size, dtype, phase)] = payload

    gradients = _gradient_type(resolved, working)
    reductions = int(resolved["gradient_accumulation_steps"]) if stage == 2 and not once else 1
    payload = reductions * sum(group_elements) * _BYTES[gradients]
    add(_reduction(zero, stage), gradients, "backward", payload)
    if stage == 0:
        add("all_reduce", "float32", "step", _NORM_BYTES if clips and not bf16 else 0)
        return moved
    add("all_reduce", "float32", "step", _NORM_BYTES * len(group_elements))
    if bf16 and resolved["bf16"].get("check_grad_overflow", True):
        add("all_reduce", "uint8", "step", _FLAG_BYTES)
    if dp_size > 1:  # DeepSpeed skips it for one rank, but not the reductions
        weights = sum(padded(elements, dp_size) for elements in group_elements)
        add("all_gather", working, "step", weights * _BYTES[working])
    return moved


def control_payloads(world_size: int, *, logged: bool) -> Payloads:
    """What the training loop adds: its agreement on a stop, and the loss when it is logged."""
    moved = {Traffic("all_reduce", "world", world_size, "int64", "control"): 8}
    if logged:  # the step's loss, and the sum since the last line to find a NaN in between
        moved[Traffic("all_reduce", "world", world_size, "float32", "control")] = 2 * 4
    return moved


def bytes_of(*payloads: Payloads) -> StepBytes:
    """Payload and ring wire bytes of everything in `payloads`."""
    return total((k, Volume(payload=size)) for moved in payloads for k, size in moved.items())


def padded(elements: int, dp_size: int) -> int:
    """Elements of an optimizer group after DeepSpeed padded it for partitioning."""
    unit = _ALIGNMENT * dp_size
    return -(-elements // unit) * unit


def _gradient_type(resolved: Mapping[str, Any], working: str) -> str:
    named = {"fp32": "float32", "bf16": "bfloat16", None: working}
    return named[resolved.get("communication_data_type")]


def _reduction(zero: Mapping[str, Any], stage: int) -> str:
    """Stages 1 and 2 reduce to every rank, unless they are told to reduce to the owners only."""
    to_owner = not zero.get("use_multi_rank_bucket_allreduce", True)
    return "reduce" if stage > 0 and to_owner and zero.get("reduce_scatter", True) else "all_reduce"
