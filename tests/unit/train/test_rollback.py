"""A rollback is a start: what it reads on the host has no limit of a step."""

from __future__ import annotations

from typing import Any

import pytest

from relora_ds import activity
from relora_ds.train import phases
from relora_ds.train.guards.steps import Rewind


def test_a_rollback_is_not_taken_for_a_step_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, float]] = []
    rewinds: list[Rewind | None] = [None, Rewind((4,), "a spike")]

    def train_phases(*arguments: Any) -> Rewind | None:
        if not rewinds[1:]:
            found.append((activity.current(), activity.stalled_s()))
        activity.at_step(5)
        monkeypatch.setattr(activity, "_moved_at", activity._moved_at - 3600.0)
        return rewinds.pop()

    def go_back(*arguments: Any) -> None:
        found.append((activity.current(), activity.stalled_s()))

    monkeypatch.setattr(phases, "_train_phases", train_phases)
    monkeypatch.setattr(phases, "_go_back", go_back)
    anything: Any = None
    try:
        phases.train(anything, anything, None)
    finally:
        activity.at_step(None)
    assert found == [("rollback", 0.0), ("start", 0.0)]
