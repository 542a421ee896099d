"""Indices on their way to a device, and writes at places that differ."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from relora_ds.numerics.transfers import orderless_writes, upload, upload_together
from tests.harness.device_costs import DEVICE, SimulatedDevice


@pytest.fixture(params=["default", "warn", "error"])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(request.param)
    yield torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(before)


def test_the_mode_is_off_within_and_as_it_was_behind(mode: int) -> None:
    with orderless_writes():
        assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_deterministic_debug_mode() == mode


def test_the_mode_survives_a_failure(mode: int) -> None:
    with pytest.raises(IndexError), orderless_writes():
        torch.zeros(2)[torch.tensor([2])] = 1.0
    assert torch.get_deterministic_debug_mode() == mode


def test_on_the_host_nothing_is_copied() -> None:
    index = torch.tensor([1, 2])
    assert upload(index, torch.device("cpu")) is index


def test_many_tensors_are_one_copy() -> None:
    tensors = [
        torch.tensor([[3, 1], [4, 1]]),
        torch.tensor(5),
        torch.empty(2, 0, dtype=torch.int64),
    ]
    for sent, arrived in zip(tensors, upload_together(tensors, torch.device("cpu")), strict=True):
        assert torch.equal(sent, arrived)
    with SimulatedDevice() as device:
        shapes = [tensor.shape for tensor in upload_together(tensors, DEVICE)]
        assert upload_together([], DEVICE) == []
    assert shapes == [tensor.shape for tensor in tensors]
    assert device.costs.queued == ["upload"]
    assert not device.costs.blocking
    assert not device.costs.waits
