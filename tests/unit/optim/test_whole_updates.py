"""The kernel that updates a whole tensor, interpreted, against the C kernels and torch's AdamW."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from relora_ds.numerics.gpu import launch
from relora_ds.optim.block_adamw import BlockAdamW
from relora_ds.optim.vector_adamw import VectorAdamW, storage_key
from relora_ds.optim.vector_clock import Fragment, VectorClock
from relora_ds.randomness import Stream
from tests.harness.device_costs import DEVICE, SimulatedDevice
from tests.harness.kernels import REASON, interpreted

__all__ = ["interpreted"]
KINDS = [
    pytest.param(VectorAdamW, torch.float32, id="fp32"),
    pytest.param(VectorAdamW, torch.bfloat16, id="bf16"),
    pytest.param(BlockAdamW, torch.float32, id="codes, fp32"),
    pytest.param(BlockAdamW, torch.bfloat16, id="codes, bf16"),
]


def clock(count: int, axis: int, aged: bool = True) -> VectorClock:
    """Vectors of different ages, of which one is frozen."""
    found = VectorClock(count, axis)
    if aged:
        found.restart(-2, torch.arange(0, count, 2))
        found.restart(-7, torch.arange(1, count, 3))
        found.freeze(2, torch.tensor([count - 1]))
    return found


def mixed() -> tuple[int, list[Fragment]]:
    """Rows, columns and parts of both that fill a tensor: nothing has the tensor's own age."""
    whole, columns = clock(5, 0), clock(7, 1)
    parts = [(0, 5 * 131, whole, 131), (3, 37 * 7 - 5, columns, 7), (40, 3, clock(4, 0), 50)]
    fragments, offset = [], 0
    for start, length, each, cols in parts:
        fragments.append(Fragment(start, offset, length, each, cols))
        offset += length
    return offset, fragments


def scattered(aged: bool) -> tuple[int, list[Fragment]]:
    """Fragments between stretches that have no clock, of more than one program's length."""
    inner = Fragment(0, 301, 6 * 200, clock(6, 0, aged), 200)
    return 2600, [inner, Fragment(0, 1501, 30 * 9, clock(9, 1, aged), 9)]


def trained(
    kind: type[VectorAdamW],
    dtype: torch.dtype,
    size: int,
    fragments: list[Fragment],
    scale: float | None = None,
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """A tensor and its state after three updates."""
    generator = torch.Generator().manual_seed(11)
    p = nn.Parameter(torch.randn(size, generator=generator).to(dtype))
    settings = {"lr": 1e-2, "weight_decay": 0.1} | settings
    optimizer = kind([p], **settings)
    optimizer.fragments = {storage_key(p): fragments}
    optimizer.roundings = {storage_key(p): Stream(5, "rounding", "p")}
    factor = None if scale is None else torch.tensor(scale)
    with torch.no_grad():
        for _ in range(3):
            spread = torch.randn(size, generator=generator).mul_(6.0).exp_()
            p.grad = (torch.randn(size, generator=generator) * spread).to(dtype)
            optimizer.update(p, optimizer.param_groups[0], factor)
    return {"p": p.detach()} | copy.deepcopy(dict(optimizer.state[p]))


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        both = [each.contiguous().view(-1).view(torch.uint8) for each in (value, expected[name])]
        assert torch.equal(*both), name


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.0, "scale": 0.3}, {"lr": 0.0}], ids=str
)
def test_vectors_of_mixed_ages_are_updated_bit_for_bit(
    interpreted: None,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[VectorAdamW],
    dtype: torch.dtype,
    settings: dict[str, Any],
) -> None:
    by_kernel = trained(kind, dtype, *mixed(), **settings)
    monkeypatch.setenv("RELORA_DS_TRITON", "0")
    same(by_kernel, trained(kind, dtype, *mixed(), **settings))


@pytest.mark.parametrize("aged", [True, False])
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_stretches_without_a_clock_have_the_tensor_s_own_age(
    interpreted: None,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[VectorAdamW],
    dtype: torch.dtype,
    aged: bool,
) -> None:
    """torch's AdamW rounds otherwise, so that a few codes and draws differ by one."""
    by_kernel = trained(kind, dtype, *scattered(aged))
    monkeypatch.setenv("RELORA_DS_TRITON", "0")
    expected = trained(kind, dtype, *scattered(aged))
    assert set(by_kernel) == set(expected)
    for name, value in by_kernel.items():
        want = expected[name].float()
        off = (value.float() - want).abs()
        assert float((off > 1e-5 * want.abs() + 1e-7).float().mean()) <= 0.01, name
        if not value.dtype.is_floating_point:
            assert float(off.max()) <= 1.0, name
        elif name == "p":
            assert float((off / (want.abs() + 1.0)).max()) <= 2.0**-7, name


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_an_update_is_two_launches_whatever_is_in_a_tensor(
    monkeypatch: pytest.MonkeyPatch, kind: type[VectorAdamW], dtype: torch.dtype
) -> None:
    pytest.importorskip("triton", reason=REASON)
    started: list[object] = []

    def start(kernel: object, *rest: object, **options: object) -> None:
        started.append(kernel)

    size, fragments = scattered(aged=True)
    p = nn.Parameter(torch.empty(size, dtype=dtype, device=DEVICE))
    optimizer = kind([p])
    optimizer.fragments = {storage_key(p): fragments}
    optimizer.roundings = {storage_key(p): Stream(5, "rounding", "p")}
    monkeypatch.setattr(launch, "usable", lambda device: device == DEVICE)
    monkeypatch.setattr(launch, "start", start)
    device = SimulatedDevice()
    p.grad = torch.empty_like(p)
    with SimulatedDevice():  # makes the state and brings tables
        optimizer.step()
    started.clear()
    with device:
        optimizer.step()
    assert len(started) == 2
    assert not device.costs.launches
    assert not device.costs.waits
    assert not device.costs.blocking
    assert device.costs.queued == ["upload"] * 2  # ages, and rates


def test_a_value_that_is_no_number_stays_one(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, fragments = mixed()
    p = nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
    optimizer = BlockAdamW([p])
    optimizer.fragments = {storage_key(p): fragments}
    optimizer.roundings = {storage_key(p): Stream(5, "rounding", "p")}
    p.grad = torch.ones_like(p)
    p.grad[300] = torch.nan
    optimizer.step()
    assert bool(p[300].isnan())
    assert int(p.isnan().sum()) >= 1
    assert not p[:256].isnan().any()
