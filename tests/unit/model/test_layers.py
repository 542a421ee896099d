"""Norm, rotary positions and MLP."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from relora_ds.model.mlp import _SwiGLU
from relora_ds.model.norm import RMSNorm
from relora_ds.model.rope import rotary_tables, rotate

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
