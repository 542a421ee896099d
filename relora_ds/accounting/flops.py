"""Parameter and floating-point operation counts: pure functions of a built model.

They read shapes only, so a model on the meta device will do. Of a model that is cut over processes
they count the whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from relora_ds.model.attention import Attention
from relora_ds.model.embedding import TokenEmbedding
from relora_ds.model.norm import RMSNorm
from relora_ds.parallel.shape import global_shape


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameter elements; one that is shared by several modules counts once.

    Args:
        trainable: elements that require a gradient.
        frozen: the others.
        by_kind: (trainable, frozen) by `embedding`, `attention`, `mlp`, `norm` and `head`.
    """

    trainable: int
    frozen: int
    by_kind: dict[str, tuple[int, int]]

    @property
    def total(self) -> int:
        """Elements of all parameters."""
        return self.trainable + self.frozen


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Count the parameters of a `Llama`."""
    by_kind: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        trainable, frozen = by_kind.get(kind_of(name), (0, 0))
        if parameter.requires_grad:
            trainable += global_shape(parameter).numel()
        else:
            frozen += global_shape(parameter).numel()
        by_kind[kind_of(name)] = (trainable, frozen)
    return ParameterCounts(
        trainable=sum(trainable for trainable, _ in by_kind.values()),
        frozen=sum(frozen for _, frozen in by_kind.values()),
        by_kind=by_kind,
    )


def kind_of(name: str) -> str:
    """What a parameter of this full name belongs to: embedding, attention, mlp, norm or head."""
    for kind, pattern in _KINDS:
        if re.search(pattern, name):
            return kind
    raise AssertionError(f"parameter {name} belongs to no part of a LLaMA model")


_KINDS = (
    ("embedding", r"(^|\.)embed_tokens\."),
    ("head", r"(^|\.)lm_head\."),
    ("attention", r"\.self_attn\."),
    ("mlp", r"\.mlp\."),
    ("norm", r"norm\.weight$"),
)


def flops_per_token(model: nn.Module, seq_length: int) -> float:
    """Floating-point operations of one forward and backward pass, per token read.

    * Every element of a matrix that multiplies activations costs 2 in the forward pass, 2 for the
      gradient of its input and, if it is trained, 2 for its own gradient: 6, or 4 when frozen. An
      element of a trained vector of non-zeros is a matrix element too.
    * The embedding is a lookup and costs nothing; the head counts, also when its weight is shared.
    * Causal attention: a token at position p attends to p + 1 of S positions, (S + 1) / 2 on
      average. Scores and weighted sum cost 2 * N * H each per attended position, and the backward
      pass costs twice the forward: 6 * N * H * (S + 1) per layer and token.
    * Norms, biases, rotations, activations, softmax and recomputation are not counted.

    Args:
        model: a `Llama`, whatever its projections are made of.
        seq_length: S.
    """
    total = 0.0
    for module in model.modules():
        if isinstance(module, Attention):
            total += 6.0 * module.query_width * (seq_length + 1)
        for parameter in _multiplied(module):
            total += (6 if parameter.requires_grad else 4) * global_shape(parameter).numel()
    return total


def _multiplied(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of this very module whose elements are multiplied with activations."""
    if isinstance(module, TokenEmbedding | RMSNorm):
        return
    for name, parameter in module.named_parameters(recurse=False):
        if name != "bias":
            yield parameter
