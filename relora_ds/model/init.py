"""Initial weights of the dense model, as a pure function of seed, name and element.

| tensor | shape | distribution |
|---|---|---|
| `model.embed_tokens.weight` | (V, D) | N(0, initializer_range^2) |
| `model.layers.*.self_attn.{q,k,v}_proj.weight` | (heads * H, D) | N(0, initializer_range^2) |
| `model.layers.*.self_attn.o_proj.weight` | (D, N * H) | N(0, initializer_range^2) |
| `model.layers.*.mlp.{gate,up}_proj.weight` | (F, D) | N(0, initializer_range^2) |
| `model.layers.*.mlp.down_proj.weight` | (D, F) | N(0, initializer_range^2) |
| `lm_head.weight` (unless tied) | (V, D) | N(0, initializer_range^2) |
| `*norm.weight` | (D,) | 1 |
| `*_proj.bias` (where configured) | (out,) | 0 |

No matrix is scaled with depth and no row is zeroed for padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from relora_ds.config.model import ModelConfig, projection_shapes
from relora_ds.numerics.draws import draw_normal
from relora_ds.randomness import Stream

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Full names of the two parameters whose rows are words."""


@dataclass(frozen=True)
class InitialWeights:
    """The initial value of every parameter of the dense model; see the module's table.

    Args:
        config: architecture.
        seed: the run's seed.
    """

    config: ModelConfig
    seed: int

    def __call__(
        self, name: str, shape: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """A whole parameter: fp32, of `shape`, on `device`.

        Raises:
            KeyError: the dense model has no parameter `name`.
            ValueError: `shape` is not that parameter's.
        """
        expected = self._shapes[name]
        if tuple(shape) != expected:
            raise ValueError(f"{name} has shape {expected}, not {tuple(shape)}")
        return self.flat(name, 0, math.prod(expected), device).view(expected)

    def flat(
        self, name: str, start: int, count: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Elements [start, start + count) of a parameter in row-major order: fp32 (count,).

        Raises:
            KeyError: the dense model has no parameter `name`.
        """
        if len(self._shapes[name]) > 1:
            values = draw_normal(Stream(self.seed, "init", name), start, count, device)
            return values.mul_(self.config.initializer_range)
        value = 0.0 if name.endswith(".bias") else 1.0
        return torch.full((count,), value, dtype=torch.float32, device=device)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return dense_shapes(self.config)


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the dense model, in Hugging Face's order."""
    width, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, width)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for name, shape in projection_shapes(config).items():
            shapes[f"{layer}.{name}.weight"] = shape
            if config.mlp_bias if name.startswith("mlp") else config.attention_bias:
                shapes[f"{layer}.{name}.bias"] = shape[:1]
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (vocab, width)
    return shapes
