"""What lies on the host beside a GPU: `meta` stands for the GPU, or torch.cuda is a stand-in."""

from __future__ import annotations

import logging
import mmap
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from relora_ds.engine.deepspeed import layouts
from relora_ds.engine.deepspeed.layouts import FlatPartitions
from relora_ds.engine.zero import host_memory, tensor_gradients
from relora_ds.engine.zero.host_memory import NodeMemory
from relora_ds.engine.zero.layout import Layout
from relora_ds.engine.zero.tensor_gradients import TensorGradients, square_sums_of_slices
from relora_ds.optim.vector_adamw import VectorAdamW
from relora_ds.parallel.tensor import SINGLE


def test_shares_of_offloaded_gradients_are_added_up_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameter = nn.Parameter(torch.empty(6, device="meta"))
    monkeypatch.setattr(tensor_gradients, "partial_gradients", lambda model: [parameter])
    piece, summed = torch.ones(3), []

    def add_up(flat: torch.Tensor) -> torch.Tensor:
        summed.append(flat.device.type)
        return torch.full(flat.shape, 5.0)  # as it comes back

    layout: Any = SimpleNamespace(
        placements=[parameter],
        gradient=lambda p: iter([piece]),
        await_gradients=lambda: None,
    )
    tp: Any = SimpleNamespace(size=2, sum=add_up)
    TensorGradients(nn.Module(), layout, tp).complete()
    assert summed == ["meta"]
    assert piece.tolist() == [5.0, 5.0, 5.0]


class _Copies:
    """An accelerator that copies gradients to the host: they are there when it was waited for."""

    def __init__(self, owner: torch.Tensor) -> None:
        self.owner, self.waits = owner, 0

    def synchronize(self) -> None:
        self.waits += 1
        if self.owner.grad is not None:
            self.owner.grad.fill_(2.0)


def _one_parameter(
    monkeypatch: pytest.MonkeyPatch, tiles: list[torch.Tensor]
) -> tuple[nn.Parameter, Layout, _Copies]:
    """A parameter (2, 3) at stage 2 on one of one ranks; without tiles its gradient is offloaded
    and under way."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 0)
    parameter, owner = nn.Parameter(torch.zeros(2, 3)), torch.zeros(6)
    owner.grad = None if tiles else torch.full((6,), torch.nan)
    wrapper, group = SimpleNamespace(averaged_gradients={0: tiles}), cast(Any, "alone")
    layout = FlatPartitions([[parameter]], VectorAdamW([owner]), group, cast(Any, wrapper))
    copies = _Copies(owner)
    monkeypatch.setattr(layouts, "get_accelerator", lambda: copies)
    return parameter, layout, copies


def test_the_host_reads_offloaded_gradients_when_they_have_arrived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameter, layout, copies = _one_parameter(monkeypatch, [])
    sums = square_sums_of_slices(layout, SINGLE, torch.device("cpu"))
    assert sums.tolist() == pytest.approx([24.0, 24.0])
    monkeypatch.setattr(tensor_gradients, "partial_gradients", lambda model: [parameter])
    tp: Any = SimpleNamespace(size=2, sum=lambda flat: flat * 2)
    assert copies.owner.grad is not None
    copies.owner.grad.fill_(torch.nan)
    TensorGradients(nn.Module(), layout, tp).complete()
    assert copies.owner.grad.tolist() == [4.0] * 6


def test_nobody_waits_for_gradients_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    _, layout, copies = _one_parameter(monkeypatch, [torch.ones(4), torch.ones(2)])
    sums = square_sums_of_slices(layout, SINGLE, torch.device("cpu"))
    assert sums.tolist() == pytest.approx([6.0, 6.0])
    assert not copies.waits


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
