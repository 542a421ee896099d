"""Figures of a device that are read together, and times between marks."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from relora_ds.numerics.transfers import Stopwatch, read_together
from tests.harness.device_costs import DEVICE, SimulatedDevice


def test_figures_keep_their_values_and_order() -> None:
    figures = [torch.tensor(2**53 - 1), torch.tensor([[0.1, -3.0], [1e-300, 2.0]]).double()]
    small = torch.tensor([0.1], dtype=torch.float32)
    found = read_together([*figures, small, torch.empty(0)])
    assert found == [[2**53 - 1], [*figures[1].flatten().tolist()], [float(small)], []]


def test_any_number_of_figures_is_one_read() -> None:
    with SimulatedDevice() as device:
        read_together([torch.zeros(3, device=DEVICE) for _ in range(9)])
    assert len(device.costs.waits) == 1


def test_times_are_between_marks() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.mark()
    time.sleep(0.02)
    watch.mark()
    first, second = watch.seconds()
    assert first >= 0.0
    assert second >= 0.02


def test_a_gpu_times_its_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            recorded.append(self)

        def elapsed_time(self, later: Event) -> float:
            return 1000.0 * (recorded.index(later) - recorded.index(self)) + 500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    watch.mark()
    watch.mark()
    assert watch.seconds() == [1.5, 1.5]
