"""Faults of a machine's memory and arithmetic, besides the ones of `tests.harness.faults`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from relora_ds.engine.engine import TrainEngine
from tests.harness.faults import Seen


@dataclass(frozen=True)
class FlipBit:
    """One bit of the last frozen weight of which this rank holds a part; the engine is the first
    argument of the function."""

    def __call__(self, seen: Seen) -> None:
        engine = seen.arguments[0]
        assert isinstance(engine, TrainEngine)
        frozen = [p for p in engine.model.parameters() if p not in engine.layout.placements]
        _, working = engine.layout.working(frozen[-1])
        words = working.view(torch.int16 if working.element_size() == 2 else torch.int32)
        words[7] ^= 1


@dataclass(frozen=True)
class EnlargeLeft:
    """The left factor of a product that is about to be added to a weight is too large."""

    factor: float

    def __call__(self, seen: Seen) -> None:
        seen.arguments[2].mul_(self.factor)
