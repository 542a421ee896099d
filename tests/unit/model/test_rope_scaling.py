"""Rotary frequencies are those of transformers, bit for bit."""

from __future__ import annotations

import pytest
import torch

from relora_ds.config.model import LinearRope, Llama3Rope, YarnRope
from relora_ds.model.rope import rotary_tables
from relora_ds.model.rope_scaling import rotary_frequencies

BLOCKS = [
    {"rope_type": "linear", "factor": 2.5},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "truncate": False,
    },
    {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 0.9,
    },
]
KINDS = {"linear": LinearRope, "llama3": Llama3Rope, "yarn": YarnRope}


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("head_dim", [8, 64, 100])
def test_frequencies_are_those_of_transformers(block, theta, head_dim):
    transformers = pytest.importorskip("transformers")
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **block},
    )
    expected, factor = rope.ROPE_INIT_FUNCTIONS[block["rope_type"]](config, torch.device("cpu"))
    scaling = KINDS[block["rope_type"]](**block)
    found, found_factor = rotary_frequencies(head_dim, theta, scaling)
    assert torch.equal(found, expected)
    assert found_factor == factor


def test_the_factor_reaches_cosines_and_sines():
    device = torch.device("cpu")
    scaling = YarnRope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    frequency, factor = rotary_frequencies(8, 10000.0, scaling)
    assert factor > 1
    cos, sin = rotary_tables(8, 10000.0, 5, device, scaling)
    angles = torch.outer(torch.arange(5.0), frequency)
    torch.testing.assert_close(cos, factor * angles.cos())
    torch.testing.assert_close(sin, factor * angles.sin())
