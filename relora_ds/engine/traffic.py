"""Bytes of one training step in closed form, as DeepSpeed 0.19.8 moves them. Pure.

T is the number of trained elements, P the same with every optimizer group padded to a multiple of
2 x dp, g and w the bytes of an element on the way of gradients and of weights:

| stage | all-reduce of gradients      | all-gather of weights | scalars                        |
|-------|------------------------------|-----------------------|--------------------------------|
| 0     | g T, once                    | -                     | one norm if fp32 and clipped   |
| 1     | g T, once                    | w P                   | a norm per group; bf16: a flag |
| 2     | g T, after every micro-batch | w P                   | a norm per group; bf16: a flag |

Gradients are not padded, and buckets split them without adding to them. Frozen weights never move:
that is the whole saving of a low-rank method here, and at accumulation k stage 2 gives (k - 1) g T
of it back. A norm is one fp32, the flag (whether a bf16 gradient overflowed) one byte.

Payload and wire bytes mean what they do in `collectives`. Events (a merge, a switch) come on top
and are small: DeepSpeed knows nothing of them. Stage 3 is not described here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from relora_ds.engine.communication import StepBytes, Traffic, Volume, total

_BYTES = {"float32": 4, "bfloat16": 2}
_NORM_BYTES = 4
_FLAG_BYTES = 1
# DeepSpeed aligns every rank's part of a group to the 4 bytes that NCCL wants, for 2-byte elements
_ALIGNMENT = 2

Payloads = dict[Traffic, int]
"""Payload bytes of a step by kind of collective, as the recorder keeps them."""


def step_payloads(
    group_elements: Sequence[int],
    resolved: Mapping[str, Any],
    dp_size: int,
    group: str = "world",
) -> Payloads:
    """What one update moves, from its first forward pass to the end of the optimizer's step.

    Args:
        group_elements: trained elements per optimizer group.
        resolved: output of `resolve_deepspeed_config`.
        dp_size: data-parallel processes.
        group: the recorder's name of their group.

    Raises:
        ValueError: the stage is not 0, 1 or 2.
    """
    zero = resolved["zero_optimization"]
    stage, clips = int(zero["stage"]), resolved["gradient_clipping"] > 0
    if stage not in (0, 1, 2):
        raise ValueError(f"ZeRO stage {stage} has no closed form here: it must be 0, 1 or 2")
    bf16 = bool(resolved["bf16"]["enabled"])
    working = "bfloat16" if bf16 else "float32"
    moved: Payloads = {}

    def add(operation: str, dtype: str, phase: str, payload: int) -> None:
        if payload:
            moved[Traffic(operation, group, dp_size, dtype, phase)] = payload

    gradients = {"fp32": "float32", "bf16": "bfloat16", None: working}[
        resolved.get("communication_data_type")
    ]
    reductions = int(resolved["gradient_accumulation_steps"]) if stage == 2 else 1
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


def _reduction(zero: Mapping[str, Any], stage: int) -> str:
    """Stages 1 and 2 reduce to every rank, unless they are told to reduce to the owners only."""
    to_owner = not zero.get("use_multi_rank_bucket_allreduce", True)
    return "reduce" if stage > 0 and to_owner and zero.get("reduce_scatter", True) else "all_reduce"
