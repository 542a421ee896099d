"""What lies on the host beside a GPU: `meta` stands for the GPU, or torch.cuda is a stand-in."""

from __future__ import annotations

import logging
import mmap
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from relora_ds.engine.zero import host_memory, tensor_gradients
from relora_ds.engine.zero.host_memory import NodeMemory
from relora_ds.engine.zero.tensor_gradients import TensorGradients


def test_shares_of_offloaded_gradients_are_added_up_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameter = nn.Parameter(torch.empty(6, device="meta"))
    monkeypatch.setattr(tensor_gradients, "partial_gradients", lambda model: [parameter])
    piece, summed = torch.ones(3), []

    def add_up(flat: torch.Tensor) -> torch.Tensor:
        summed.append(flat.device.type)
        return torch.full(flat.shape, 5.0)  # as it comes back

    layout: Any = SimpleNamespace(placements=[parameter], gradient=lambda p: iter([piece]))
    tp: Any = SimpleNamespace(size=2, sum=add_up)
    TensorGradients(nn.Module(), layout, tp).complete()
    assert summed == ["meta"]
    assert piece.tolist() == [5.0, 5.0, 5.0]


class _Runtime:
    """cudaHostRegister and its companions.

    Args:
        code: what registering answers.
    """

    def __init__(self, code: int) -> None:
        self.code, self.calls = code, cast(list[str], [])
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        if not self.code:
            self.registered[address] = size
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0

    def cudaGetLastError(self) -> int:  # noqa: N802
        self.calls.append("cleared")
        return self.code


def _memory(monkeypatch: pytest.MonkeyPatch, code: int) -> tuple[NodeMemory, _Runtime]:
    runtime = _Runtime(code)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    host_memory._warn_of_pageable_memory.cache_clear()
    return NodeMemory(shared=False), runtime


def test_host_memory_is_pinned_as_long_as_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, runtime = _memory(monkeypatch, 0)
    tensor = memory.tensor((4, 3), torch.float32)
    assert runtime.registered == {tensor.data_ptr(): mmap.PAGESIZE}
    row = tensor[1]
    del tensor
    assert runtime.registered  # a view keeps the storage
    del row
    assert not runtime.registered


def test_memory_that_cannot_be_pinned_is_used_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory, runtime = _memory(monkeypatch, 2)
    with caplog.at_level(logging.WARNING):
        tensors = [memory.tensor((4,), torch.float32) for _ in range(3)]
    assert runtime.calls == ["cleared"] * 3  # or the next CUDA call of anybody fails
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "ulimit -l" in caplog.text
    tensors[0].fill_(3.0)
    assert tensors[0].tolist() == [3.0] * 4
