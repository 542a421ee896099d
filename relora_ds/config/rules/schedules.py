"""Rules on the learning rate over the run."""

from __future__ import annotations

from collections.abc import Iterator

from relora_ds.config.methods.base import MethodSettings
from relora_ds.config.reading.document import Finding
from relora_ds.config.sections import ScheduleConfig, TrainConfig


def warmup_ends(
    train: TrainConfig, schedule: ScheduleConfig, method: MethodSettings
) -> Iterator[Finding]:
    before = method.warm_start.steps if method.warm_start else 0
    rest = train.steps - before
    if 0 < rest <= schedule.warmup_steps:
        phase = f"train.steps ({train.steps})"
        if before:
            # the schedule starts afresh, warm-up included, when the method takes over
            phase = f"the {rest} steps after method.warm_start_steps ({before})"
        yield Finding(
            ("schedule", "warmup_steps"),
            f"is {schedule.warmup_steps}, but must be less than {phase}: "
            "about a tenth of the steps is usual",
        )
