"""Learning-rate factors as pure functions of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from zero, then a decay over the remaining steps.

    Update number u + 1 uses the factor at u: with a warm-up the first update has a rate of zero.

    Args:
        name: shape of the decay.
        steps: optimizer steps that the schedule spans.
        warmup_steps: length of the warm-up.
        min_lr_ratio: factor at the end of the decay and beyond it.
    """

    name: Literal["cosine", "linear", "constant"]
    steps: int
    warmup_steps: int
    min_lr_ratio: float

    def __call__(self, step: float) -> float:
        """Factor for the update that follows `step` completed ones."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        return self.decay(step)

    def decay(self, step: float) -> float:
        """The factor as if the warm-up were over."""
        if self.name == "constant":
            return 1.0
        span = max(1, self.steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        falling = (
            (1.0 + math.cos(math.pi * progress)) / 2.0 if self.name == "cosine" else 1.0 - progress
        )
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * falling
