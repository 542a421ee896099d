"""Bytes of one training step over a tensor-parallel group, in closed form. Pure.

With T tokens per micro-batch, D the model's width, L layers, e bytes of an activation, r the rank:

| what                                                      | payload                | phase    |
|-----------------------------------------------------------|------------------------|----------|
| embedding                                                 | e T D                  | forward  |
| outputs of attention and MLP                              | 2 L e T D              | forward  |
| softmax over the vocabulary: maximum; sum and target      | 3 x 4 T                | forward  |
| gradients of the inputs of attention, MLP and head        | (2 L + 1) e T D        | backward |
| `act`: the (T, r) product of every adapter                | e T r each             | backward |
| recomputed outputs, with activation checkpointing         | 2 L e T D              | backward |
| `fold`: gradients of factors that every rank holds whole  | this rank's slices     | step     |
| norm                                                      | 4 per group, and more  | step     |

The first six are per micro-batch, the others once per optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from relora_ds.engine.traffic import Payloads, Traffic
from relora_ds.model.attention import Attention
from relora_ds.model.embedding import TokenEmbedding
from relora_ds.parallel.linear import Projection
from relora_ds.parallel.shape import full_shape

_NORM_BYTES = 4
_WIDE_BYTES = 4


def tensor_payloads(
    model: nn.Module,
    resolved: Mapping[str, Any],
    tokens: int,
    size: int,
    share_elements: int,
    groups: int,
    group: str = "tp",
) -> Payloads:
    """What one update moves within a tensor-parallel group, from its first forward pass on.

    Args:
        model: a `Llama` that belongs to the group, on any device.
        resolved: output of `resolve_deepspeed_config`.
        tokens: read per micro-batch.
        size: ranks of the group.
        share_elements: gradient elements in this rank's slices of the projections'
            `partial_gradients`.
        groups: optimizer groups.
        group: the recorder's name of it.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    embedding = next(module for module in model.modules() if isinstance(module, TokenEmbedding))
    width = full_shape(embedding.weight)[1]
    projections = [module for module in model.modules() if isinstance(module, Projection)]
    bf16 = bool(resolved["bf16"]["enabled"])
    working, element = ("bfloat16", 2) if bf16 else ("float32", 4)
    recomputed = any(layer.recomputed for layer in projections)
    activation = element * tokens * width
    micro_batches = int(resolved["gradient_accumulation_steps"])
    blocks = 2 * len(layers)
    inner = sum(layer.summed_activations() for layer in projections)

    moved: Payloads = {}

    def add(dtype: str, phase: str, payload: int) -> None:
        if payload:
            kind = Traffic("all_reduce", group, size, dtype, phase)
            moved[kind] = moved.get(kind, 0) + payload

    add(working, "forward", micro_batches * (blocks + 1) * activation)
    add("float32", "forward", micro_batches * 3 * _WIDE_BYTES * tokens)
    backward = (blocks * (2 if recomputed else 1) + 1) * activation + element * tokens * inner
    add(working, "backward", micro_batches * backward)
    add(working, "step", element * share_elements)
    for dtype, payload in _norms(resolved, groups, bf16):
        add(dtype, "step", payload)
    return moved


def _norms(resolved: Mapping[str, Any], groups: int, bf16: bool) -> list[tuple[str, int]]:
    """Scalars: norms by DeepSpeed and, where it reports none, by us; the bf16 overflow flag."""
    stage, clips = int(resolved["zero_optimization"]["stage"]), resolved["gradient_clipping"] > 0
    if stage == 0 and not bf16:
        return [("float32", _NORM_BYTES * (1 + clips))]
    # stage 3 adds its norms up in double precision
    norms = [("float64", 8 * groups)] if stage == 3 else [("float32", _NORM_BYTES * groups)]
    return [*norms, ("uint8", 1)] if bf16 and stage > 0 else norms
