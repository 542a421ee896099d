"""Small architectures that cover the model's options, and models filled with drawn weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from relora_ds.config.model import Llama3Rope, ModelConfig, YarnRope
from relora_ds.model.init import InitialWeights
from relora_ds.model.llama import Llama
from relora_ds.parallel.linear import DenseLinear

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi_head": {},
    "grouped_query": {"num_key_value_heads": 2, "rope_theta": 500000.0},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": Llama3Rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    },
    "yarn": {
        "rope_scaling": YarnRope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    },
    "odd": {"vocab_size": 131, "intermediate_size": 45, "head_dim": 12, "num_key_value_heads": 1},
}


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """Each variant in turn."""
    return ModelConfig(**{**BASE, **VARIANTS[request.param]})


@pytest.fixture
def plain() -> ModelConfig:
    """The variant without options."""
    return ModelConfig(**BASE)


@pytest.fixture
def build() -> Callable[..., Llama]:
    """Builds a dense model whose every tensor, norms and biases too, differs from its default."""

    def make(config: ModelConfig, **options: Any) -> Llama:
        model = Llama(config, DenseLinear, **options)
        weights = InitialWeights(config, seed=1)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights(name, tuple(parameter.shape)))
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture
def tokens(config: ModelConfig) -> torch.Tensor:
    """(3, 18) token ids."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(config.vocab_size, (3, 18), generator=generator)
