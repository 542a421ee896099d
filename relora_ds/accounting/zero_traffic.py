"""Bytes of one training step in closed form, as DeepSpeed moves them. Pure.

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

What matrix-wise optimizers exchange comes on top; see `matrix_traffic`.

Payload and wire bytes mean what they do in `collectives`. Events (a merge, a switch) come on top
and are small: DeepSpeed knows nothing of them. At stage 3 the first micro-batch of a run, and the
first after an evaluation or an event's probe, is recorded anew and moves more than the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from relora_ds.accounting.matrix_traffic import MatrixTraffic
from relora_ds.accounting.recorder import StepBytes, Traffic, Volume, total
from relora_ds.accounting.zero3_gathers import Replay, gathered
from relora_ds.parallel.ownership import padded
from relora_ds.parallel.zero import ZeroSettings

_NORM_BYTES = 4
_NORM_BYTES_STAGE_3 = 8
_FLAG_BYTES = 1

HPZ_GROUP = "hpz"
"""The recorder's name of the group that holds one copy of the weights under hpZ."""

Payloads = dict[Traffic, int]
"""Payload bytes of a step by kind of collective, as the recorder keeps them."""


def expected_payloads(
    model: nn.Module,
    groups: Sequence[Sequence[nn.Parameter]],
    zero: ZeroSettings,
    dp_size: int,
    *,
    group: str = "world",
    tp_size: int = 1,
    replay: Replay | None = None,
    matrices: MatrixTraffic | None = None,
) -> Payloads:
    """What one update moves, from its first forward pass to the end of the optimizer's step.

    Args:
        model: a `Llama` in training mode on the meta device.
        groups: its trained parameters by optimizer group.
        zero: how the step is shared over processes.
        dp_size: data-parallel processes.
        group: the recorder's name of the processes' group.
        tp_size: processes that share a copy of the model.
        replay: what `gathered` returned for them, where it is known already.
        matrices: what matrix-wise optimizers exchange.

    Raises:
        ValueError: an option of stage 3 is set that makes the figure inexact.
    """
    if zero.stage < 3:
        elements = [sum(p.numel() for p in parameters) for parameters in groups]
        moved = step_payloads(elements, zero, dp_size, group=group)
    else:
        moved = _stage3_payloads(groups, zero, dp_size, group)
    if zero.stage == 3 and dp_size > 1:
        found = replay or gathered(model, zero.gathering, dp_size, zero.accumulation, tp_size)
        moved |= _gather_payloads(found, zero, (group, dp_size))
    if zero.stage and matrices is not None:
        for kind, payload in matrices.payloads(matrices.sliced, group, dp_size).items():
            moved[kind] = moved.get(kind, 0) + payload
    return moved


def _stage3_payloads(
    groups: Sequence[Sequence[nn.Parameter]],
    zero: ZeroSettings,
    dp_size: int,
    group: str,
) -> Payloads:
    for key, value, replayed in _not_replayed(zero):
        if value != replayed:
            raise ValueError(
                f"zero_optimization.{key} is {value!r}, which has no closed form at stage 3: "
                "remove it, or measure with benchmarks/communication.py"
            )
    sizes = [[-(-p.numel() // dp_size) for p in parameters] for parameters in groups]
    reduced = dp_size * sum(map(sum, sizes)) * (1 if zero.reduces_once else zero.accumulation)
    norms = sum(len(sub_groups(each, zero.sub_group)) for each in sizes)
    gradients, size = dtype_name(zero.gradient_dtype), zero.gradient_dtype.itemsize
    found = {
        ("reduce_scatter", group, dp_size, gradients, "backward"): reduced * size,
        ("all_reduce", group, dp_size, "float64", "step"): norms * _NORM_BYTES_STAGE_3,
    }
    return {Traffic(*kind): payload for kind, payload in found.items() if payload}


def _not_replayed(zero: ZeroSettings) -> list[tuple[str, object, object]]:
    """Options of stage 3 that change what is moved: key, value, and the one that is replayed."""
    return [
        ("reduce_scatter", zero.reduce_scatter, True),
        ("stage3_use_all_reduce_for_fetch_params", zero.gathers_by_all_reduce, False),
        ("stage3_module_granularity_threshold", zero.module_granularity, 0),
        ("stage3_model_persistence_threshold", zero.model_persistence, None),
        ("enable_sanity_checks", zero.sanity_checks, False),
        ("offload_optimizer", zero.offloads_optimizer, False),
        ("offload_param", zero.offloads_weights, False),
    ]


def _gather_payloads(replay: Replay, zero: ZeroSettings, everyone: tuple[str, int]) -> Payloads:
    near, working = (HPZ_GROUP, zero.gathering.hpz), dtype_name(zero.dtype)
    return {
        Traffic("all_gather", *(near if gather.near else everyone), working, gather.phase): (
            elements * zero.element_size
        )
        for gather, elements in replay.elements.items()
        if elements
    }


def sub_groups(partitions: Sequence[int], limit: int) -> list[int]:
    """Sizes of the flat tensors that DeepSpeed cuts an optimizer group into at stage 3.

    Args:
        partitions: elements of its parameters' slices, in order.
        limit: `sub_group_size`.
    """
    if limit >= sum(partitions):
        return [sum(partitions)]
    sizes, held = [], 0
    for number, size in enumerate(partitions, 1):
        held += size
        if held >= limit or number == len(partitions):
            sizes.append(held)
            held = 0
    return sizes


def step_payloads(
    group_elements: Sequence[int],
    zero: ZeroSettings,
    dp_size: int,
    *,
    group: str = "world",
) -> Payloads:
    """What one update moves at stages 0 to 2, where numbers of elements are enough to know it.

    Args:
        group_elements: trained elements per optimizer group.
        zero: how the step is shared over processes.
        dp_size: data-parallel processes.
        group: the recorder's name of the processes' group.

    Raises:
        ValueError: the stage is not 0, 1 or 2.
    """
    stage, bf16 = zero.stage, zero.dtype == torch.bfloat16
    if stage not in (0, 1, 2):
        raise ValueError(f"stage {stage} needs the model's order: call expected_payloads")
    moved: Payloads = {}

    def add(operation: str, dtype: str, phase: str, payload: int) -> None:
        if payload:
            moved[Traffic(operation, group, dp_size, dtype, phase)] = payload

    reductions = zero.accumulation if stage == 2 and not zero.reduces_once else 1
    if stage and dp_size == 1 and not zero.offloads_optimizer:  # they lie where they are read
        reductions = 0
    payload = reductions * sum(group_elements) * zero.gradient_dtype.itemsize
    add(_reduction(zero), dtype_name(zero.gradient_dtype), "backward", payload)
    if stage == 0:
        add("all_reduce", "float32", "step", _NORM_BYTES if zero.clip > 0 and not bf16 else 0)
        return moved
    add("all_reduce", "float32", "step", _NORM_BYTES * len(group_elements))
    if bf16 and zero.checks_overflow:
        add("all_reduce", "uint8", "step", _FLAG_BYTES)
    if dp_size > 1:
        weights = sum(padded(elements, dp_size) for elements in group_elements)
        add("all_gather", dtype_name(zero.dtype), "step", weights * zero.element_size)
    return moved


def control_payloads(world_size: int, *, logged: bool, guarded: bool = False) -> Payloads:
    """What the training loop adds to a step.

    Args:
        world_size: processes of the run.
        logged: whether the step has a line in the log, for which the loss is averaged.
        guarded: whether `guards` decide about every update before it is applied.
    """
    # whether to stop, and twice the digest of the place in the run
    moved = {Traffic("all_reduce", "world", world_size, "int64", "control"): 3 * 8}
    if logged:  # the step's loss, and sums since the last line to find a NaN in between
        moved[Traffic("all_reduce", "world", world_size, "float32", "control")] = 3 * 4
    if guarded:  # loss and square sums of gradients
        kind = Traffic("all_gather", "world", world_size, "float64", "step")
        moved[kind] = world_size * 3 * 8
    return moved


def bytes_of(*payloads: Payloads) -> StepBytes:
    """Payload and ring wire bytes of everything in `payloads`."""
    return total((k, Volume(payload=size)) for moved in payloads for k, size in moved.items())


def dtype_name(dtype: torch.dtype) -> str:
    """What the recorder calls a dtype."""
    return str(dtype).removeprefix("torch.")


def _reduction(zero: ZeroSettings) -> str:
    """Stages 1 and 2 reduce to every rank, unless they are told to reduce to the owners only."""
    to_owner = zero.stage > 0 and zero.reduce_scatter and not zero.joins_owners
    return "reduce" if to_owner else "all_reduce"
