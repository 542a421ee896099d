"""Long draws: the C kernels and the tensor operations agree bit for bit, and both are close to
the mathematical functions."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_ds import randomness
from relora_ds.numerics import draws
from relora_ds.numerics.draws import draw_normal, draw_uniform
from relora_ds.numerics.host.kernels import load_kernels
from relora_ds.randomness import Stream

STREAM = Stream(42, "init", "model.layers.0.self_attn.q_proj.weight")
KINDS = {"uniform": draw_uniform, "normal": draw_normal}


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if load_kernels(draws._SOURCE) is None:
        pytest.skip("needs a C compiler")


@pytest.mark.parametrize("kind", KINDS)
@given(start=st.integers(0, 1 << 40), count=st.integers(0, 1500), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_kernel_and_operations_agree_bit_for_bit(
    kind: str, start: int, count: int, seed: int
) -> None:
    stream = Stream(seed, "init", "weight")
    found = KINDS[kind](stream, start, count)
    expected = getattr(stream, kind)(start, count)
    assert found.dtype == torch.float32
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_million_draws_agree_bit_for_bit_on_any_number_of_threads(kind: str) -> None:
    expected = getattr(STREAM, kind)(3, 1 << 20)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(KINDS[kind](STREAM, 3, 1 << 20), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_compiler_the_operations_draw(kind: str) -> None:
    expected = KINDS[kind](STREAM, 7, 1000)
    with mock.patch.object(draws, "load_kernels", return_value=None):
        assert torch.equal(KINDS[kind](STREAM, 7, 1000), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_other_devices_take_the_operations(kind: str) -> None:
    drawn = KINDS[kind](STREAM, 0, 12, "meta")
    assert (drawn.device.type, drawn.shape, drawn.dtype) == ("meta", (12,), torch.float32)


def _halves(count: int) -> torch.Tensor:
    """Numbers below 2**32: random ones, both ends, and the surroundings of every eighth."""
    random = STREAM.words(0, count) & 0xFFFFFFFF
    edges = torch.arange(8).mul_(1 << 29).unsqueeze(1) + torch.arange(-40, 41)
    return torch.cat([random, edges.flatten() & 0xFFFFFFFF])


def test_the_exact_steps_are_close_to_the_functions() -> None:
    halves = _halves(200_000)
    uniform = (halves.double() + 0.5) * 2.0**-32
    expected = uniform.log()
    assert float(((randomness._log(uniform) - expected) / expected).abs().max()) < 2.0**-51
    angle = (halves.double() + 0.5) * (2.0 * torch.pi * 2.0**-32)
    error = (randomness._cosine(halves) - angle.cos()).abs()
    # relative too: the cosine is never zero on this grid
    assert float((error / angle.cos().abs()).max()) < 2.0**-51


def test_golden_bits() -> None:
    """Runs on any device begin with these very numbers."""
    expected = [0x3F8129F2, -0x40CC32A7, -0x40A090B4, 0x3EB4CA65]
    assert draw_normal(STREAM, 0, 4).view(torch.int32).tolist() == expected
    tail = draw_normal(STREAM, (1 << 40) + 1, 2).view(torch.int32).tolist()
    assert tail == [0x3FC13F64, 0x3F5D8D7E]
