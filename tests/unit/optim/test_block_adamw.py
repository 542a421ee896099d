"""Moments in eight bits: what codes keep, how far training moves, what a reset touches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from relora_ds.numerics.codes import block_codes
from relora_ds.numerics.codes.block_codes import BLOCK, Codes
from relora_ds.optim.block_adamw import BlockAdamW
from relora_ds.optim.vector_adamw import VectorAdamW, storage_key
from relora_ds.optim.vector_clock import Fragment, VectorClock

KINDS = [torch.int8, torch.uint8]


def codes_of(values: torch.Tensor, kind: torch.dtype) -> Codes:
    codes = Codes(torch.zeros(values.numel(), dtype=kind), torch.zeros(-(-values.numel() // BLOCK)))
    codes.store(values)
    return codes


@pytest.mark.parametrize("kind", KINDS)
def test_zero_and_the_largest_of_a_block_are_exact(kind: torch.dtype) -> None:
    values = torch.randn(3 * BLOCK + 7, generator=torch.Generator().manual_seed(0))
    values = values if kind == torch.int8 else values.abs()
    values[5:20] = 0.0
    found = codes_of(values, kind).load()
    assert bool((found[5:20] == 0).all())
    for at in range(0, values.numel(), BLOCK):
        largest = values[at : at + BLOCK].abs().argmax() + at
        assert float(found[largest]) == float(values[largest])
    assert float((found - values).norm() / values.norm()) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_stable(kind: torch.dtype) -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(1)) ** 6
    codes = codes_of(values, kind)
    again = codes_of(codes.load(), kind)
    assert torch.equal(codes.codes, again.codes)
    assert torch.equal(codes.scales, again.scales)


@pytest.mark.parametrize(("spread", "bound"), [(None, 0.022), (1.0, 0.028), (2.0, 0.08)])
@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_codes_are_closer_than_linear_ones(
    kind: torch.dtype, spread: float | None, bound: float
) -> None:
    """Moments of neighbouring weights differ by orders of magnitude, and an update is their ratio:
    what counts is the relative error of each, here the root of its mean square, on normal and on
    log-normal values. (Linear codes are 1.5 times closer where all magnitudes are alike.)"""
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(400 * BLOCK, generator=generator)
    if spread is not None:
        values = values.sign() * torch.exp(spread * torch.randn(400 * BLOCK, generator=generator))
    values = values if kind == torch.int8 else values.abs()
    levels = torch.iinfo(kind).max
    scale = values.abs().view(-1, BLOCK).amax(1).repeat_interleave(BLOCK) / levels
    linear = (values / scale).round() * scale

    def error(found: torch.Tensor) -> float:
        return float((found / values - 1).square().mean().sqrt())

    dynamic = error(codes_of(values, kind).load())
    assert dynamic < 0.25 * error(linear)
    assert dynamic < bound


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_and_the_operations_give_the_same_bits(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(5)
    count = 50 * BLOCK + 77
    values = torch.exp(5 * torch.randn(count, generator=generator))
    values *= torch.randn(count, generator=generator).sign() if kind == torch.int8 else 1
    values[5:900] = 0.0
    values[1000:1300] *= 1e-38
    values[2000:2010] = -0.0
    tables = block_codes.code_tables(kind, torch.device("cpu"))
    assert int(tables.nearby.int().diff().max()) == 1  # what the kernel relies on
    found = codes_of(values, kind)
    loaded = found.load()
    monkeypatch.setattr("relora_ds.numerics.host.kernels._SHARED_FROM", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    threaded = codes_of(values, kind)
    assert torch.equal(threaded.load(), loaded)
    monkeypatch.setattr(block_codes, "load_kernels", lambda source: None)
    expected = codes_of(values, kind)
    for other in (found, threaded):
        assert torch.equal(other.codes, expected.codes)
        assert torch.equal(other.scales, expected.scales)
    assert torch.equal(loaded, expected.load())


@pytest.mark.parametrize("compiler", [True, False])
def test_roots_are_those_of_ieee(compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler:
        monkeypatch.setattr(block_codes, "load_kernels", lambda source: None)
    generator = torch.Generator().manual_seed(6)
    values = torch.rand(500 * BLOCK + 3, generator=generator).mul_(120).sub_(60).exp_()
    expected = values.double().sqrt().float()
    assert torch.equal(block_codes.take_roots(values), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_spoils_its_block_and_no_other(kind: torch.dtype) -> None:
    values = torch.ones(3 * BLOCK)
    values[BLOCK + 3] = torch.nan
    found = codes_of(values, kind).load().view(3, BLOCK)
    assert found.isnan().all(1).tolist() == [False, True, False]


def test_a_positive_second_moment_never_vanishes() -> None:
    values = torch.tensor([1.0, 1e-12, 0.0, 1e-30])
    assert codes_of(values, torch.uint8).load().gt(0).tolist() == [True, True, False, True]
    assert codes_of(torch.zeros(4), torch.int8).load().tolist() == [0.0] * 4


def test_a_reset_leaves_the_rest_of_the_block_alone() -> None:
    values = torch.randn(2 * BLOCK, generator=torch.Generator().manual_seed(2))
    codes = codes_of(values, torch.int8)
    before = codes.load()
    codes.codes[100:300].masked_fill_(torch.ones(200, dtype=torch.bool), 0.0)
    after = codes.load()
    assert bool((after[100:300] == 0).all())
    assert torch.equal(after[:100], before[:100])
    assert torch.equal(after[300:], before[300:])


def problem() -> tuple[nn.Parameter, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs, target = (torch.randn(256, n, generator=generator) for n in (48, 40))
    return nn.Parameter(torch.randn(40, 48, generator=generator) * 0.1), inputs, target


def losses(kind: type[VectorAdamW], steps: int = 150) -> list[float]:
    weight, inputs, target = problem()
    optimizer = kind([weight], lr=1e-2)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (inputs @ weight.t() - target).square().mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.slow
def test_training_follows_32_bit_states() -> None:
    exact, coded = losses(VectorAdamW), losses(BlockAdamW)
    assert exact[-1] < 0.9 * exact[0]
    assert coded == pytest.approx(exact, rel=5e-3)


def test_a_cut_in_stretches_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = losses(BlockAdamW, 5)
    monkeypatch.setattr("relora_ds.optim.vector_adamw._CACHED", 2 * BLOCK)
    assert losses(BlockAdamW, 5) == whole


def test_clocks_reach_across_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relora_ds.optim.vector_adamw._CACHED", BLOCK)
    moved = []
    for kind in (VectorAdamW, BlockAdamW):
        weight, inputs, target = problem()
        optimizer = kind([weight], lr=1e-2)
        clock = VectorClock(40, 0)
        fragment = Fragment(0, 0, weight.numel(), clock, 48)
        optimizer.fragments = {storage_key(weight): [fragment]}
        frozen = torch.empty(0)
        for step in range(6):
            if step == 3:
                clock.restart(3, torch.arange(10, 20))
                clock.freeze(5, torch.tensor([30, 31]))
                optimizer.state[weight]["exp_avg"][10:20] = 0
                optimizer.state[weight]["exp_avg_sq"][10:20] = 0
                frozen = weight.detach()[30:32].clone()
            optimizer.zero_grad()
            (inputs @ weight.t() - target).square().mean().backward()
            optimizer.step()
            if step == 4:
                assert torch.equal(weight.detach()[30:32], frozen)
        moved.append(weight.detach().clone())
    start = problem()[0].detach()
    assert float((moved[1] - moved[0]).norm() / (moved[0] - start).norm()) < 0.02


def test_save_and_load_keep_every_bit() -> None:
    weight, inputs, target = problem()
    optimizer = BlockAdamW([weight], lr=1e-2)
    loaded_weight = nn.Parameter(torch.empty(40, 48))
    loaded = BlockAdamW([loaded_weight], lr=1e-2)
    for step in range(6):
        for w, o in ((weight, optimizer), (loaded_weight, loaded)):
            if w is weight or step >= 3:
                o.zero_grad()
                (inputs @ w.t() - target).square().mean().backward()
                o.step()
        if step == 2:
            loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            loaded_weight.data.copy_(weight.data)
            assert loaded.state[loaded_weight]["exp_avg"].dtype == torch.int8
            assert loaded.state[loaded_weight]["exp_avg_sq"].dtype == torch.uint8
    assert torch.equal(weight, loaded_weight)


def test_bytes_per_weight() -> None:
    weight = nn.Parameter(torch.zeros(64, 256))
    optimizer = BlockAdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = sum(t.numel() * t.element_size() for t in optimizer.state[weight].values() if t.ndim)
    assert held == weight.numel() * 2 * (1 + 4 / BLOCK)
