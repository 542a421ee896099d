"""Rules on the learning rate over the run."""

from __future__ import annotations

from collections.abc import Iterator

from relora_ds.config.methods.base import MethodSettings
from relora_ds.config.reading.document import Finding
from relora_ds.config.sections import ScheduleConfig, TrainConfig


def warmup_ends(
    train: TrainConfig, schedule: ScheduleConfig, method: MethodSettings
) -> Iterator[Finding]:
    rest, phase = _own_steps(train, method)
    if 0 < rest <= schedule.warmup_steps:
        yield Finding(
            ("schedule", "warmup_steps"),
            f"is {schedule.warmup_steps}, but must be less than {phase}: "
            "about a tenth of the steps is usual",
        )


def decay_leaves_a_stable_phase(
    train: TrainConfig, schedule: ScheduleConfig, method: MethodSettings
) -> Iterator[Finding]:
    rest, phase = _own_steps(train, method)
    stable = schedule.stable_steps(rest)
    if stable is None or rest <= schedule.warmup_steps or stable > schedule.warmup_steps:
        return
    yield Finding(
        ("schedule", "decay_steps"),
        f"is {schedule.decay_length(rest)}, but schedule.warmup_steps ({schedule.warmup_steps}) "
        f"and the decay of wsd together must be less than {phase}, or there is no stable phase "
        "between them: a tenth of the steps is usual",
    )


def decay_is_of_wsd(schedule: ScheduleConfig) -> Iterator[Finding]:
    for key in ("decay_steps", "decay_shape"):
        given = getattr(schedule, key) != ScheduleConfig.model_fields[key].default
        if given and schedule.name != "wsd":
            yield Finding(
                ("schedule", key),
                f"has no effect: schedule.name is {schedule.name}, whose decay is not set apart; "
                "only wsd has one",
            )


def _own_steps(train: TrainConfig, method: MethodSettings) -> tuple[int, str]:
    """Steps that the method's schedule spans, and what they are called.

    It starts afresh, warm-up included, when a method takes over from a warm start.
    """
    before = method.warm_start.steps if method.warm_start else 0
    rest = train.steps - before
    if before:
        return rest, f"the {rest} steps after method.warm_start_steps ({before})"
    return rest, f"train.steps ({train.steps})"
