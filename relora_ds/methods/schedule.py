"""Learning-rate factors as pure functions of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "linear", "sqrt"]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from zero, then a decay over the remaining steps or over the last of them.

    Update number u + 1 uses the factor at u: with a warm-up the first update has a rate of zero.

    Args:
        name: course of the factor after the warm-up. `wsd`: 1 until the last `decay_steps`.
        steps: optimizer steps that the schedule spans.
        warmup_steps: length of the warm-up.
        min_lr_ratio: factor at the end of the decay and beyond it.
        decay_steps: length of the decay of `wsd`.
        decay_shape: how `wsd` decays.
    """

    name: Literal["cosine", "linear", "constant", "wsd"]
    steps: int
    warmup_steps: int
    min_lr_ratio: float
    decay_steps: int = 0
    decay_shape: Shape = "linear"

    def __call__(self, step: float) -> float:
        """Factor for the update that follows `step` completed ones."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        return self.decay(step)

    @property
    def stable_steps(self) -> int | None:
        """Completed updates at the end of the stable phase; None without one that ends."""
        return self.steps - self.decay_steps if self.name == "wsd" else None

    def decay(self, step: float) -> float:
        """The factor as if the warm-up were over."""
        if self.name == "constant":
            return 1.0
        stable = self.stable_steps
        if stable is None:
            begin, shape = self.warmup_steps, self.name
        elif step <= stable:
            return 1.0
        else:
            begin, shape = stable, self.decay_shape
        progress = min(1.0, (step - begin) / max(1, self.steps - begin))
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * _left(shape, progress)


def _left(shape: str, progress: float) -> float:
    """What is left of the fall from 1 to 0 after a share of the decay."""
    if shape == "cosine":
        return (1.0 + math.cos(math.pi * progress)) / 2.0
    return 1.0 - (math.sqrt(progress) if shape == "sqrt" else progress)
