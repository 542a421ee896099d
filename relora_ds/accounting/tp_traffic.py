"""Bytes of one training step over a tensor-parallel group, in closed form. Pure.

With T tokens per micro-batch, D the model's width, L layers, e bytes of an activation, r the rank:

| what                                                      | payload                | phase    |
|-----------------------------------------------------------|------------------------|----------|
| embedding                                                 | e T D                  | forward  |
| outputs of attention and MLP                              | 2 L e T D              | forward  |
| softmax over the vocabulary: maximum; sum and target      | 3 x 4 T                | forward  |
| gradients of the inputs of attention, MLP and head        | (2 L + 1) e T D        | backward |
| `act`: the (T, r) products, joined and divided            | e T r each             | both     |
| `act` without such products: the factor, 2 x and 1 x      | e r n or e m r each    | both     |
| recomputed outputs of attention, with checkpointing       | L e T D                | backward |
| `fold`: gradients of factors that every rank holds whole  | this rank's slices     | step     |
| norm                                                      | 4 per group, and more  | step     |
| matrix-wise optimizers: sharded matrices                  | see `matrix_traffic`   | step     |

The first seven are per micro-batch, the others once per optimizer step. With sequence parallelism
each of the (T, D) sums is an all-gather where a block is entered or a reduce-scatter where it is
left, and the shares are those of norms and biases too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from relora_ds.accounting.footprints import footprints
from relora_ds.accounting.matrix_traffic import NOTHING, GroupExchange, MatrixTraffic
from relora_ds.accounting.recorder import Traffic, Volume, Volumes
from relora_ds.accounting.zero_traffic import Payloads, dtype_name
from relora_ds.model.attention import Attention
from relora_ds.model.embedding import TokenEmbedding
from relora_ds.model.llama import partial_gradients
from relora_ds.model.loss import chunk_rows
from relora_ds.parallel.footprint import Exchange, Operation, UpdateSize
from relora_ds.parallel.linear import Projection
from relora_ds.parallel.ownership import padded
from relora_ds.parallel.shape import global_shape, tp_local_shape
from relora_ds.parallel.zero import ZeroSettings

_NORM_BYTES = 4
_WIDE_BYTES = 4


@dataclass(frozen=True)
class GroupWork:
    """What one update asks of a tensor-parallel group, as one of its ranks sees it."""

    ranks: int
    """Processes in the group."""
    update: UpdateSize
    """What a rank reads, and how it computes."""
    share_elements: int
    """Gradient elements in this rank's slices of the model's `partial_gradients`; see
    `shares_by_rank`."""
    optimizer_groups: int
    matrices: GroupExchange = NOTHING
    """What matrix-wise optimizers exchange."""
    name: str = "tp"
    """The recorder's name of the group."""


def tensor_payloads(model: nn.Module, zero: ZeroSettings, work: GroupWork) -> Payloads:
    """Payload bytes that one update moves within a tensor-parallel group.

    Counted from the first forward pass to the end of the optimizer's step.

    Args:
        model: a `Llama` that belongs to the group, on any device.
        zero: how the step is shared over data-parallel processes.
        work: the group and its update.
    """
    found = tensor_volumes(model, zero, work)
    return {kind: volume.payload for kind, volume in found.items()}


def tensor_volumes(model: nn.Module, zero: ZeroSettings, work: GroupWork) -> Volumes:
    """Calls and payload bytes of one update within a tensor-parallel group.

    Counted from the first forward pass to the end of the optimizer's step.

    Args:
        model: a `Llama` that belongs to the group, on any device.
        zero: how the step is shared over data-parallel processes.
        work: the group and its update.
    """
    working, element = dtype_name(zero.dtype), zero.element_size
    micro_batches = zero.accumulation
    moved: Volumes = {}

    def add(operation: str, dtype: str, phase: str, volume: Volume) -> None:
        if volume.payload:
            kind = Traffic(operation, work.name, work.ranks, dtype, phase)
            found = moved.setdefault(kind, Volume())
            found.calls, found.payload = found.calls + volume.calls, found.payload + volume.payload

    def add_exchange(each: Exchange, dtype: str, size: int, times: int = 1) -> None:
        volume = Volume(times * each.calls, times * size * each.elements)
        add(each.operation, dtype, each.phase, volume)

    add_exchange(_of_loss(model, work.update), "float32", _WIDE_BYTES, micro_batches)
    for each in _of_blocks(model, work.update.tokens):
        add_exchange(each, working, element, micro_batches)
    for layer in footprints(model, work.update).values():
        for each in layer.exchanges:
            add_exchange(each, working, element)
    add("all_reduce", working, "step", Volume(1, element * work.share_elements))
    for dtype, volume in _norms(zero, work.optimizer_groups).items():
        add("all_reduce", dtype, "step", volume)
    for kind, payload in MatrixTraffic.payloads(work.matrices, work.name, work.ranks).items():
        add(kind.operation, kind.dtype, kind.phase, Volume(1, payload))
    return moved


def _of_loss(model: nn.Module, update: UpdateSize) -> Exchange:
    """Exchange of one micro-batch's softmax over the vocabulary, in fp32.

    Every chunk exchanges a maximum, and the sum together with the target's logit.
    """
    # the head holds as many words as the embedding does
    words = tp_local_shape(_embedding(model).weight)[0]
    chunks = -(-update.tokens // chunk_rows(words, update.device))
    return Exchange("all_reduce", "forward", 2 * chunks, 3 * update.tokens)


def _of_blocks(model: nn.Module, tokens: int) -> Iterator[Exchange]:
    """Exchanges of one micro-batch, in the working type, where blocks, embedding and head are
    entered and left."""
    modules, embedding = list(model.modules()), _embedding(model)
    activation = tokens * global_shape(embedding.weight)[1]
    blocks = 2 * sum(isinstance(module, Attention) for module in modules)
    recomputed = any(isinstance(module, Projection) and module.recomputed for module in modules)
    # a layer is recomputed up to the last tensor that its backward pass needs: an input of `down`
    again = blocks if recomputed else 0
    repeated: dict[Operation, int] = {"all_reduce": again // 2}
    if embedding.tp.sequence:
        # the embedding is only left, the head only entered; the way back is the transpose
        repeated = {"all_gather": again, "reduce_scatter": again // 2}
    calls = blocks + 1
    for operation, more in repeated.items():
        yield Exchange(operation, "forward", calls, calls * activation)
        yield Exchange(operation, "backward", calls + more, (calls + more) * activation)


def _embedding(model: nn.Module) -> TokenEmbedding:
    return next(module for module in model.modules() if isinstance(module, TokenEmbedding))


def _norms(zero: ZeroSettings, groups: int) -> dict[str, Volume]:
    """Scalars by type: norms by DeepSpeed and, where it reports none, by us; the bf16 overflow
    flag, which stage 3 does not exchange."""
    stage, clips, bf16 = zero.stage, zero.clip > 0, zero.dtype == torch.bfloat16
    if stage == 0 and not bf16:
        return {"float32": Volume(1 + clips, _NORM_BYTES * (1 + clips))}
    # stage 3 adds its norms up in double precision
    dtype, size = ("float64", 2 * _NORM_BYTES) if stage == 3 else ("float32", _NORM_BYTES)
    found = {dtype: Volume(groups, size * groups)}
    checks = stage == 0 or (stage < 3 and zero.checks_overflow)
    return found | {"uint8": Volume(1, 1)} if bf16 and checks else found


def shares_by_rank(
    model: nn.Module, groups: Sequence[Sequence[nn.Parameter]], stage: int, dp_size: int
) -> list[int]:
    """Elements of unfinished gradients that each data-parallel rank has to add up.

    Args:
        model: a tensor-parallel rank's part of a `Llama`, on the meta device.
        groups: its trained parameters by optimizer group.
        stage: ZeRO stage: from 1 on a rank keeps a slice of each group, at 3 of each parameter.
        dp_size: data-parallel processes.
    """
    partial = set(partial_gradients(model))
    flats = [[p] for group in groups for p in group] if stage == 3 else groups
    held = torch.zeros(dp_size, dtype=torch.int64)
    for flat in flats:
        whole = sum(parameter.numel() for parameter in flat)
        share = -(-whole // dp_size) if stage == 3 else padded(whole, dp_size) // dp_size
        first = torch.arange(dp_size) * share if stage else torch.zeros_like(held)
        last = first + (share if stage else whole)
        at = 0
        for parameter in flat:
            end = at + parameter.numel()
            if parameter in partial:
                held += (last.clamp(max=end) - first.clamp(min=at)).clamp(min=0)
            at = end
    return held.tolist()
