"""Learning-rate factors against the published check values and a second implementation."""

from __future__ import annotations

import math
from typing import Any

import pytest

from relora_ds.config.methods.full import FullConfig
from relora_ds.config.methods.lora import LoRAConfig
from relora_ds.config.methods.relora import ReLoRAConfig
from relora_ds.methods.full import Full
from relora_ds.methods.lora import LoRA
from relora_ds.methods.relora.relora import ReLoRA
from relora_ds.methods.schedule import Schedule

STEPS, WARMUP, RAMP, EVERY, FLOOR = 15000, 500, 100, 5000, 0.1


def relora(steps: int, every: int, ramp: int, shift: int = 0) -> ReLoRA:
    config = ReLoRAConfig(
        name="relora", merge_every=every, restart_warmup_steps=ramp, adjust_step=shift
    )
    return ReLoRA(config, 42, steps)


def wsd(steps: int, decay: int, shape: Any = "linear", floor: float = 0.1) -> Schedule:
    return Schedule("wsd", steps, 10, floor, decay, shape)


def relora_under(schedule: Schedule, every: int, ramp: int, in_decay: bool = False) -> ReLoRA:
    config = ReLoRAConfig(
        name="relora", merge_every=every, restart_warmup_steps=ramp, merge_in_decay=in_decay
    )
    return ReLoRA(config, 42, schedule.steps, stable_steps=schedule.stable_steps)


def jagged_cosine(
    u: int, *, steps: int, warmup: int, ramp: int, every: int, shift: int, floor: float
) -> float:
    """The authors' table, transcribed case by case."""
    if u < warmup:
        return u / warmup
    c = u + shift
    q, k = c % every, c // every
    if q < ramp and u >= every:
        p = (k * every + ramp - warmup) / (steps - warmup)
        rising = q / ramp
    else:
        p = (c - warmup) / (steps - warmup)
        rising = 1.0
    return rising * (floor + (1 - floor) * (1 + math.cos(math.pi * min(p, 1.0))) / 2)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (499, 0.998),
        (500, 1.0),
        (4999, 0.802615),
        (5000, 0.0),
        (5001, 0.007944),
        (5099, 0.786462),
        (5100, 0.794406),
        (10000, 0.0),
        (10100, 0.330652),
        (14999, 0.1),
        (15000, 0.0),
        (20000, 0.0),
    ],
)
def test_jagged_cosine_check_values(step: int, expected: float) -> None:
    schedule = Schedule("cosine", STEPS, WARMUP, FLOOR)
    method = relora(STEPS, EVERY, RAMP)
    assert method.lr_multiplier(step, schedule) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": 300, "warmup": 20, "ramp": 10, "every": 100, "shift": 0, "floor": 0.1},
        {"steps": 300, "warmup": 20, "ramp": 10, "every": 100, "shift": 5, "floor": 0.1},
        {"steps": 300, "warmup": 20, "ramp": 10, "every": 100, "shift": 40, "floor": 0.0},
        {"steps": 300, "warmup": 0, "ramp": 1, "every": 7, "shift": 0, "floor": 0.3},
        {"steps": 290, "warmup": 13, "ramp": 0, "every": 60, "shift": 0, "floor": 0.1},
        {"steps": 290, "warmup": 13, "ramp": 59, "every": 60, "shift": 47, "floor": 1.0},
        {"steps": 120, "warmup": 50, "ramp": 4, "every": 20, "shift": 0, "floor": 0.1},
    ],
)
def test_jagged_cosine_equals_the_table_everywhere(setting: dict[str, Any]) -> None:
    method = relora(setting["steps"], setting["every"], setting["ramp"], setting["shift"])
    schedule = Schedule("cosine", setting["steps"], setting["warmup"], setting["floor"])
    for u in range(setting["steps"] + 20):
        expected = jagged_cosine(u, **setting)
        assert method.lr_multiplier(u, schedule) == pytest.approx(expected, abs=1e-12), u


def test_rate_is_zero_right_after_every_merge_and_at_the_start() -> None:
    method, schedule = relora(100, 20, 5), Schedule("linear", 100, 10, 0.1)
    zeros = [u for u in range(100) if method.lr_multiplier(u, schedule) == 0.0]
    assert zeros == [0, *(step for step in range(100) if method.is_merge_step(step))]


def test_ramp_ends_where_the_plain_schedule_is() -> None:
    method, schedule = relora(100, 20, 5), Schedule("cosine", 100, 10, 0.1)
    plain = [schedule(u) for u in range(100)]
    for u in range(100):
        inside = u >= 20 and u % 20 < 5
        assert (method.lr_multiplier(u, schedule) == plain[u]) is not inside
        if inside:
            goal = plain[u // 20 * 20 + 5]
            assert method.lr_multiplier(u, schedule) == pytest.approx(u % 20 / 5 * goal)


@pytest.mark.parametrize(
    ("name", "middle"), [("cosine", 0.2 + 0.8 * 0.5), ("linear", 0.2 + 0.8 * 0.5), ("constant", 1)]
)
def test_plain_shapes(name: Any, middle: float) -> None:
    schedule = Schedule(name, 110, 10, 0.2)
    assert [schedule(u) for u in (0, 1, 5, 9)] == pytest.approx([0.0, 0.1, 0.5, 0.9])
    assert schedule(10) == 1.0
    assert schedule(60) == pytest.approx(middle)
    end = 1.0 if name == "constant" else 0.2
    assert [schedule(u) for u in (110, 111, 10_000)] == pytest.approx([end] * 3)


def test_cosine_and_linear_between_the_ends() -> None:
    cosine, linear = Schedule("cosine", 100, 0, 0.0), Schedule("linear", 100, 0, 0.0)
    for u in range(101):
        assert linear(u) == pytest.approx(1 - u / 100)
        assert cosine(u) == pytest.approx(math.cos(math.pi * u / 200) ** 2)


def test_no_warm_up_starts_at_the_peak_and_a_schedule_of_warm_up_alone_is_defined() -> None:
    assert Schedule("cosine", 10, 0, 0.1)(0) == 1.0
    assert Schedule("linear", 5, 5, 0.0)(5) == 1.0
    assert Schedule("linear", 5, 5, 0.0)(6) == 0.0


def test_other_methods_follow_the_plain_schedule() -> None:
    schedule = Schedule("cosine", 50, 5, 0.1)
    for method in (Full(FullConfig(name="full"), 1, 50), LoRA(LoRAConfig(name="lora"), 1, 50)):
        assert [method.lr_multiplier(u, schedule) for u in range(60)] == [
            schedule(u) for u in range(60)
        ]


@pytest.mark.parametrize(
    ("shape", "left"),
    [("linear", 0.75), ("cosine", (1 + math.cos(math.pi / 4)) / 2), ("sqrt", 0.5)],
)
def test_wsd_stays_and_then_falls(shape: Any, left: float) -> None:
    schedule = wsd(100, 20, shape)
    assert [schedule(u) for u in (0, 5, 10, 50, 79, 80)] == pytest.approx([0, 0.5, 1, 1, 1, 1])
    assert schedule(85) == pytest.approx(0.1 + 0.9 * left)
    assert all(schedule(u) > schedule(u + 1) for u in range(80, 100))
    assert [schedule(u) for u in (100, 500)] == pytest.approx([0.1, 0.1])


def test_a_longer_wsd_run_has_the_same_rates_and_merges_until_the_shorter_one_decays() -> None:
    short, long = wsd(100, 20), wsd(300, 50)
    methods = [relora_under(schedule, 40, 5) for schedule in (short, long)]
    for step in range(80 + 1):  # the update after the stable phase is the first of the decay
        rates = [m.lr_multiplier(step, s) for m, s in zip(methods, (short, long), strict=True)]
        assert rates[0] == rates[1] or step == 80, step
    assert [methods[0].is_merge_step(s) for s in range(80)] == [
        methods[1].is_merge_step(s) for s in range(80)
    ]
    # the longer run makes up for the merge that falls on the end of the shorter stable phase
    assert (methods[0].is_merge_step(80), methods[1].is_merge_step(80)) == (False, True)


def test_relora_neither_merges_nor_ramps_in_the_decay_of_wsd() -> None:
    schedule = wsd(200, 60)
    method = relora_under(schedule, 20, 5)
    merges = [step for step in range(201) if method.is_merge_step(step)]
    assert merges == [20, 40, 60, 80, 100, 120]
    assert [method.lr_multiplier(u, schedule) for u in range(140, 201)] == [
        schedule(u) for u in range(140, 201)
    ]
    assert method.lr_multiplier(120, schedule) == 0.0


def test_relora_merges_and_ramps_in_the_decay_where_it_is_asked_to() -> None:
    schedule = wsd(200, 60)
    method = relora_under(schedule, 20, 5, in_decay=True)
    assert [step for step in range(201) if method.is_merge_step(step)] == list(range(20, 200, 20))
    assert method.lr_multiplier(180, schedule) == 0.0
    assert method.lr_multiplier(182, schedule) == pytest.approx(0.4 * schedule(185))
