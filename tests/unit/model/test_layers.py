"""Norm, rotary positions, MLP and the choice of the attention kernel."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.nn import functional as F

from relora_ds.errors import ConfigError
from relora_ds.model import attention
from relora_ds.model.llama import Llama
from relora_ds.model.mlp import _SwiGLU
from relora_ds.model.norm import RMSNorm
from relora_ds.model.rope import rotary_tables, rotate
from relora_ds.parallel.linear import DenseLinear

CPU = torch.device("cpu")


def test_norm_takes_its_statistics_in_fp32():
    norm = RMSNorm(64, 1e-6)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = 100 * torch.randn(5, 64)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    half = norm.bfloat16()
    wide = x.bfloat16().float()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * half.weight.float()
    assert torch.equal(half(x.bfloat16()), expected.bfloat16())


def test_rotation_depends_on_the_distance_only():
    cos, sin = rotary_tables(8, 10000.0, 40, CPU)
    query, key = torch.randn(8), torch.randn(8)
    turned_q, turned_k = (rotate(x.expand(1, 40, 1, 8), cos, sin)[0, :, 0] for x in (query, key))
    products = turned_q @ turned_k.t()
    for distance in (0, 5, 20):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)


def test_positions_survive_a_cast_of_the_model(plain, build):
    """bf16 tables would make positions 256 and 257 the same; a float buffer would be cast."""
    model = build(plain).bfloat16()
    assert not list(model.buffers())
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[1:]))
    model(torch.zeros(1, 301, dtype=torch.long))
    (cos, sin), (want_cos, want_sin) = seen[0], rotary_tables(8, 10000.0, 300, CPU)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos, want_cos)
    assert torch.equal(sin, want_sin)
    position, frequency = 257, 1.0
    assert cos[position, 0].item() == pytest.approx(torch.tensor(position * frequency).cos().item())


def test_tables_made_for_inference_serve_training(plain, build):
    rotary_tables.cache_clear()
    model = build(plain)
    tokens = torch.arange(11).view(1, 11)
    with torch.inference_mode():
        model(tokens)
    model(tokens).backward()


def test_swiglu_equals_autograd():
    gate, up = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.equal(_SwiGLU.apply(gate, up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(_SwiGLU.apply, (gate, up))


def test_flash_on_a_machine_without_it_is_an_error(plain, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"CUDA device.*set train\.attention to auto or sdpa"):
        Llama(plain, DenseLinear, attention="flash")
    with pytest.raises(ConfigError, match="'falsh'; use auto, flash or sdpa"):
        Llama(plain, DenseLinear, attention="falsh")


@pytest.fixture
def flash_installed(monkeypatch):
    """A machine with CUDA and flash-attn; what flash-attn is called with is recorded."""
    calls = []

    def flash_attn_func(q, k, v, causal, deterministic):
        calls.append(deterministic)
        assert causal
        return attention._sdpa(q, k, v)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "_load_flash", lambda: (flash_attn_func, ""))
    attention._choose.cache_clear()
    yield calls
    attention._choose.cache_clear()


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "missing"),
    [
        ("cpu", torch.bfloat16, 64, "CUDA tensor .got cpu"),
        ("cuda", torch.float32, 64, "fp16 or bf16 .got torch.float32"),
        ("cuda", torch.bfloat16, 320, "head_dim of at most 256 .got 320"),
        ("cuda", torch.bfloat16, 64, None),
        ("cuda", torch.float16, 256, None),
    ],
)
@pytest.mark.usefixtures("flash_installed")
def test_choice_of_kernel(device, dtype, head_dim, missing):
    device = torch.device(device)
    automatic = attention.select_kernel("auto", device, dtype, head_dim)
    assert automatic == ("sdpa" if missing else "flash")
    assert attention.select_kernel("sdpa", device, dtype, head_dim) == "sdpa"
    if missing is None:
        assert attention.select_kernel("flash", device, dtype, head_dim) == "flash"
    else:
        with pytest.raises(ConfigError, match=missing):
            attention.select_kernel("flash", device, dtype, head_dim)


def test_explicit_flash_fails_at_first_use_on_a_cpu_tensor(plain, flash_installed, build):
    model = build(plain, attention="flash")
    with pytest.raises(ConfigError, match="CUDA tensor"):
        model(torch.arange(9).view(1, 9))
    assert not flash_installed


def test_flash_gets_heads_in_its_own_layout(plain, flash_installed, build, monkeypatch):
    tokens = torch.arange(18).view(2, 9)
    expected = build(plain, attention="sdpa")(tokens)
    monkeypatch.setattr(attention, "select_kernel", lambda *args: "flash")
    assert torch.equal(build(plain)(tokens), expected)
    assert flash_installed == [False, False]


def test_the_choice_is_logged_once(plain, build, caplog):
    attention._choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="relora_ds.model.attention"):
        for _ in range(2):
            build(plain)(torch.arange(9).view(1, 9))
    assert [record.getMessage() for record in caplog.records] == [
        m for m in caplog.messages if m.startswith("attention kernel for cpu torch.float32: sdpa")
    ]
    assert len(caplog.records) == 1
