"""Bytes of a step in closed form; the ranks themselves check it in tests/distributed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from relora_ds.accounting.recorder import StepBytes, Traffic
from relora_ds.accounting.zero_traffic import (
    bytes_of,
    control_payloads,
    expected_payloads,
    padded,
    step_payloads,
)
from relora_ds.parallel.zero import ZeroSettings

GROUPS = (10, 7)


def settings(stage: int, *, bf16: bool = False, clip: float = 1.0, steps: int = 1) -> ZeroSettings:
    dtype = torch.bfloat16 if bf16 else torch.float32
    return ZeroSettings(stage, dtype, accumulation=steps, clip=clip)


def test_groups_are_padded_to_two_elements_per_rank() -> None:
    assert [padded(elements, 4) for elements in (0, 1, 8, 9)] == [0, 8, 8, 16]


@pytest.mark.parametrize(
    ("zero", "payload", "wire"),
    [
        # 17 elements, 12 + 8 after padding; a norm per group; a ring of two sends all of an
        # all-reduce and half of an all-gather
        (settings(0), 17 * 4 + 4, 17 * 4 + 4),
        (settings(0, clip=0.0, steps=3), 17 * 4, 17 * 4),
        (settings(0, bf16=True), 17 * 2, 17 * 2),
        (settings(1, steps=3), 17 * 4 + 8 + 20 * 4, 17 * 4 + 8 + 10 * 4),
        (settings(2, steps=3), 3 * 17 * 4 + 8 + 20 * 4, 3 * 17 * 4 + 8 + 10 * 4),
        (settings(2, bf16=True), 17 * 2 + 8 + 1 + 20 * 2, 17 * 2 + 8 + 1 + 10 * 2),
    ],
)
def test_bytes_of_two_ranks(zero: ZeroSettings, payload: int, wire: float) -> None:
    assert bytes_of(step_payloads(GROUPS, zero, 2)) == StepBytes(payload, wire)


def test_one_rank_sends_nothing_and_gathers_nothing() -> None:
    moved = step_payloads(GROUPS, settings(2), 1)
    assert {kind.operation for kind in moved} == {"all_reduce"}
    assert bytes_of(moved).wire == 0.0


def test_gradients_can_travel_in_another_type() -> None:
    zero = replace(settings(1, bf16=True), communication_dtype=torch.float32)
    moved = step_payloads(GROUPS, zero, 2)
    assert moved[Traffic("all_reduce", "world", 2, "float32", "backward")] == 17 * 4
    assert moved[Traffic("all_gather", "world", 2, "bfloat16", "step")] == 20 * 2


def test_reduction_to_owners_is_another_operation() -> None:
    zero = replace(settings(2), joins_owners=False)
    assert Traffic("reduce", "dp", 4, "float32", "backward") in step_payloads(
        GROUPS, zero, 4, group="dp"
    )


def test_the_loop_adds_a_stop_flag_and_the_logged_loss() -> None:
    assert bytes_of(control_payloads(2, logged=False)) == StepBytes(24, 24.0)
    assert bytes_of(control_payloads(2, logged=True)) == StepBytes(36, 36.0)
    # of an all-gather, half of what everyone gets comes from elsewhere
    guarded = control_payloads(2, logged=False, guarded=True)
    assert bytes_of(guarded) == StepBytes(24 + 48, 24.0 + 24.0)


def test_stage_3_needs_the_order_of_modules() -> None:
    with pytest.raises(ValueError, match="expected_payloads"):
        step_payloads(GROUPS, settings(3), 2)


def test_options_that_are_not_replayed_are_refused_by_name() -> None:
    zero = replace(settings(3), gathers_by_all_reduce=True)
    with pytest.raises(ValueError, match="stage3_use_all_reduce_for_fetch_params is True"):
        expected_payloads(nn.Linear(2, 2), [], zero, 2)


def test_one_reduction_makes_stage_2_move_what_stage_1_does() -> None:
    held_back = replace(settings(2, bf16=True, steps=9), reduces_once=True)
    once = step_payloads(GROUPS, held_back, 4)
    assert once == step_payloads(GROUPS, settings(1, bf16=True, steps=9), 4)
