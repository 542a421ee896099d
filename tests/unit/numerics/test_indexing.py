"""Indices on their way to a device, and writes at places that differ."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from relora_ds.numerics.indexing import orderless_writes, upload


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
