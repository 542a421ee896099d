"""Stochastic rounding to bf16: unbiased, one of two neighbours, and the same wherever it runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from relora_ds.numerics import rounding
from relora_ds.numerics.rounding import round_at_random
from relora_ds.optim.block_adamw import BlockAdamW
from relora_ds.optim.vector_adamw import VectorAdamW, storage_key
from relora_ds.optim.vector_clock import Fragment, VectorClock
from relora_ds.randomness import Stream

STREAM = Stream(42, "rounding", "layer.weight")
KINDS = [VectorAdamW, BlockAdamW]


@pytest.fixture(params=["kernel", "operations"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The C kernel, and what runs on other devices or without a compiler."""
    if request.param == "operations":
        monkeypatch.setattr(rounding, "load_kernels", lambda source: None)
    return request.param


def rounded(values: torch.Tensor, event: int = 0, start: int = 0) -> torch.Tensor:
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    round_at_random(values, out, Stream(42, "rounding", "layer.weight", event), start)
    return out


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16)


def values(count: int = 4096) -> torch.Tensor:
    """Both signs, all magnitudes, subnormal ones included."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-140, 120, (count,), generator=generator)
    return torch.ldexp(torch.randn(count, generator=generator), exponents)


@pytest.mark.usefixtures("way")
def test_every_result_is_one_of_the_two_neighbours() -> None:
    exact = values()
    down = bits((exact.view(torch.int32) & -65536).view(torch.float32).bfloat16())
    for event in range(4):
        step = bits(rounded(exact, event)) - down
        assert set(step.tolist()) == {0, 1}


@pytest.mark.usefixtures("way")
def test_the_mean_of_many_draws_is_the_value() -> None:
    draws = 40_000
    for value in (1.0 + 1e-4, -3.0 - 0.7 / 256, 1e-40, 7.3e30):
        exact = torch.full((draws,), value)
        found = rounded(exact).double()
        low, high = float(found.min()), float(found.max())
        share = (float(exact[0]) - low) / (high - low)
        assert 0.0 < share < 1.0
        wrong = float(found.mean()) - float(exact[0])
        deviation = (share * (1 - share) / draws) ** 0.5
        assert abs(wrong) <= 4 * deviation * (high - low)


@pytest.mark.usefixtures("way")
def test_what_bf16_can_hold_stays_as_it_is() -> None:
    largest = torch.finfo(torch.bfloat16).max
    special = [0.0, -0.0, 1.0, -2.5, largest, -largest, torch.inf, -torch.inf, 2.0**-133]
    exact = torch.cat([torch.tensor(special), values().bfloat16().float()])
    for event in range(4):
        assert torch.equal(bits(rounded(exact, event)), bits(exact.bfloat16()))
    assert bool(rounded(torch.tensor([torch.nan, -torch.nan])).isnan().all())


@pytest.mark.usefixtures("way")
def test_finite_values_never_become_infinite() -> None:
    largest = torch.finfo(torch.float32).max
    found = rounded(torch.tensor([largest, -largest]).repeat(500))
    assert found.abs().unique().tolist() == [torch.finfo(torch.bfloat16).max]


@pytest.mark.usefixtures("way")
def test_a_slice_is_rounded_as_within_the_whole() -> None:
    exact = values(3001)
    whole = rounded(exact, 7)
    assert torch.equal(bits(rounded(exact[1000:2500], 7, 1000)), bits(whole[1000:2500]))
    assert not torch.equal(whole, rounded(exact, 8))


def test_the_kernel_and_the_operations_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = values(100_003)
    expected = rounded(exact, 3)
    monkeypatch.setattr("relora_ds.numerics.host.kernels._SHARED_FROM", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(bits(rounded(exact, 3)), bits(expected))
    monkeypatch.setattr(rounding, "load_kernels", lambda source: None)
    assert torch.equal(bits(rounded(exact, 3)), bits(expected))


def trained(
    kind: type[VectorAdamW], weight: torch.Tensor, steps: int, lr: float, weight_decay: float = 0.0
) -> tuple[nn.Parameter, VectorAdamW]:
    """Constant gradients of one, so that every update is one learning rate."""
    parameter = nn.Parameter(weight.clone())
    optimizer = kind([parameter], lr=lr, weight_decay=weight_decay)
    optimizer.roundings = {storage_key(parameter): STREAM}
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_updates_below_half_a_last_place_add_up(kind: type[VectorAdamW]) -> None:
    """A last place of numbers below one is 2^-8; 200 updates of 2^-14 are three of them."""
    start, lr, steps = torch.full((4096,), 0.9), 2.0**-14, 200
    exact, _ = trained(kind, start, steps, lr)
    nearest = start.bfloat16()
    for _ in range(steps):
        nearest -= lr
    assert torch.equal(nearest, start.bfloat16())
    found, _ = trained(kind, start.bfloat16(), steps, lr)
    moved = start.bfloat16().double() - found.detach().double()
    meant = float((start - exact.detach()).mean())
    assert float(moved.mean()) == pytest.approx(meant, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_one_update_is_the_fp32_update_but_for_the_rounding(kind: type[VectorAdamW]) -> None:
    start = torch.randn(700, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact, own = trained(kind, start.float(), 1, lr=1e-2, weight_decay=0.1)
    found, optimizer = trained(kind, start, 1, lr=1e-2, weight_decay=0.1)
    assert torch.equal(bits(found.detach()), bits(rounded(exact.detach(), 0)))
    for key, value in own.state[exact].items():
        assert torch.equal(optimizer.state[found][key], value), key
        assert optimizer.state[found][key].dtype == value.dtype, key


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_vectors_do_not_move(kind: type[VectorAdamW]) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = nn.Parameter(torch.randn(40, 48, generator=generator).bfloat16())
    before = weight.detach().clone()
    optimizer = kind([weight], lr=1e-2, weight_decay=0.1)
    clock = VectorClock(48, 1)
    optimizer.fragments = {storage_key(weight): [Fragment(0, 0, weight.numel(), clock, 48)]}
    optimizer.roundings = {storage_key(weight): STREAM}
    frozen = torch.tensor([3, 17, 47])
    clock.freeze(5, frozen)
    for step in range(6):
        weight.grad = torch.randn(40, 48, generator=generator).bfloat16()
        optimizer.step()
        still = (bits(weight.detach()) == bits(before)).all(0)
        assert still.nonzero().flatten().tolist() == (frozen.tolist() if step < 5 else [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_state_has_every_bit(kind: type[VectorAdamW]) -> None:
    start = torch.randn(1000, generator=torch.Generator().manual_seed(3)).bfloat16()
    parameter, optimizer = trained(kind, start, 3, lr=1e-2)
    other = nn.Parameter(parameter.detach().clone())
    loaded = kind([other], lr=1e-2)
    loaded.roundings = {storage_key(other): STREAM}
    loaded.load_state_dict(optimizer.state_dict())
    for key, value in optimizer.state[parameter].items():
        assert loaded.state[other][key].dtype == value.dtype
        assert torch.equal(loaded.state[other][key], value)
