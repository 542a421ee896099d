"""Codes of weight changes: their size, their rounding, and what feedback makes of it."""

from __future__ import annotations

import pytest
import torch

from relora_ds.numerics.codes.wire_codes import BLOCK, Bits, coded_bytes, decode, encode

SIZES = (1, 2, 255, 256, 257, 1000)


def changes(count: int, seed: int = 0) -> torch.Tensor:
    """Values whose magnitudes differ by block."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=draw)
    return values * 10.0 ** -(torch.arange(count) // BLOCK).float()


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("count", SIZES)
def test_a_code_has_the_size_it_is_said_to_have(bits: Bits, count: int) -> None:
    code = encode(changes(count), bits)
    assert code.dtype == torch.uint8
    assert code.numel() == coded_bytes(count, bits)
    assert decode(code, count, bits).shape == (count,)


@pytest.mark.parametrize(("bits", "levels"), [(4, 7), (8, 127)])
def test_an_element_is_off_by_half_a_step_of_its_block_at_most(bits: Bits, levels: int) -> None:
    values = changes(1000)
    error = (decode(encode(values, bits), 1000, bits) - values).abs()
    for first in range(0, 1000, BLOCK):
        block = slice(first, first + BLOCK)
        step = values[block].abs().max() / levels
        assert error[block].max() <= 0.5001 * step
        assert error[block].max() > 0.3 * step


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_zeros_and_the_largest_magnitudes_survive(bits: Bits) -> None:
    values = torch.zeros(2 * BLOCK)
    values[BLOCK] = -3.0
    values[BLOCK + 1] = 3.0
    assert torch.equal(decode(encode(values, bits), len(values), bits), values)


def test_32_bits_are_exact_and_16_are_bf16() -> None:
    values = changes(300)
    assert torch.equal(decode(encode(values, 32), 300, 32), values)
    assert torch.equal(decode(encode(values, 16), 300, 16), values.bfloat16().float())


@pytest.mark.parametrize("bits", [4, 8])
def test_tiny_blocks_stay_finite(bits: Bits) -> None:
    values = torch.full((BLOCK,), 1e-44)
    assert decode(encode(values, bits), BLOCK, bits).isfinite().all()


def test_with_feedback_nothing_is_lost_over_rounds() -> None:
    change, residual, sent = changes(512), torch.zeros(512), torch.zeros(512)
    for _ in range(50):
        wanted = change + residual
        got = decode(encode(wanted, 4), 512, 4)
        sent, residual = sent + got, wanted - got
    assert torch.allclose(sent + residual, 50 * change, rtol=1e-4)
    assert residual.abs().max() < change.abs().max()
