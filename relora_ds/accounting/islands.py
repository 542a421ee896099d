"""Bytes between islands in closed form. Pure.

A rank exchanges what it holds with the ranks in its place on the other islands, and nothing else:
with G islands, and n elements of what is trained on the rank,

| what               | when                           | collective         | payload   |
|--------------------|--------------------------------|--------------------|-----------|
| gradients          | every update, if shared        | all-reduce         | g n       |
| changes of masters | at the end of a round          | all-reduce         | 4 (n + p) |
|                    | the same, in fewer bits        | all-gather         | G c       |
| a fragment         | when it leaves                 | all-reduce         | 4 m       |
|                    | the same, in fewer bits        | all-gather         | G c       |
| factors            | where a merge follows a round  | all-gather         | 4 G f     |
| dense gradients    | where a refresh follows it     | all-reduce         | 4 d       |

m is what of n is in the fragment, without padding. g is the size of a gradient's element in working
precision, p the padding of the rank's slices, c the size of their code with its scales, f the
part of n that belongs to factors of merged products, and d the elements of the rank's part of the
projections whose gradients it has in turn. Payload means what it does in `collectives`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from relora_ds.accounting.recorder import Traffic
from relora_ds.accounting.zero_traffic import Payloads, dtype_name, sub_groups
from relora_ds.numerics.codes.wire_codes import coded_bytes
from relora_ds.parallel.ownership import padded, slices_of_groups
from relora_ds.parallel.shape import shard_of, tp_local_shape
from relora_ds.parallel.zero import ZeroSettings

GROUP = "islands"
"""The recorder's name of the group of ranks with one place in their islands."""

_MASTER = 4
"""Bytes of an element of a master."""


def shared_gradients(
    groups: Sequence[Sequence[nn.Parameter]], zero: ZeroSettings, islands: int, dp_rank: int
) -> Payloads:
    """What islands exchange in an update whose gradients they share.

    Args:
        groups: trained parameters by optimizer group; of what is cut over tensor-parallel ranks
            this rank's part. They may be without memory.
        zero: of one island.
        islands: how many there are.
        dp_rank: the rank's place among the copies of its island.
    """
    slices = slices_of_groups(groups, zero.stage, zero.dp_size).values()
    held = sum(lengths[dp_rank] for lengths in slices)
    return _payloads("all_reduce", islands, dtype_name(zero.dtype), held * zero.element_size)


def end_of_round(
    groups: Sequence[Sequence[nn.Parameter]],
    zero: ZeroSettings,
    islands: int,
    dp_rank: int,
    bits: int = 32,
    merged: Collection[nn.Parameter] = (),
) -> Payloads:
    """What islands exchange at the end of a round.

    Args:
        groups: see `shared_gradients`.
        zero: of one island.
        islands: how many there are.
        dp_rank: the rank's place among the copies of its island.
        bits: of an element.
        merged: factors of products that are merged right after.
    """
    owners = _owners(groups, zero)
    if bits == 32:
        found = _payloads("all_reduce", islands, "float32", sum(owners) * _MASTER)
    else:
        codes = sum(coded_bytes(elements, bits) for elements in owners)
        found = _payloads("all_gather", islands, "uint8", islands * codes)
    slices = slices_of_groups(groups, zero.stage, zero.dp_size)
    factors = islands * sum(slices[factor][dp_rank] for factor in merged)
    return found | _payloads("all_gather", islands, "float32", factors * _MASTER)


def fragment_of_round(
    groups: Sequence[Sequence[nn.Parameter]],
    zero: ZeroSettings,
    islands: int,
    dp_rank: int,
    fragment: Collection[nn.Parameter],
    bits: int = 32,
) -> Payloads:
    """What islands exchange when one of several fragments leaves.

    Args:
        groups: see `shared_gradients`.
        zero: of one island.
        islands: how many there are.
        dp_rank: the rank's place among the copies of its island.
        fragment: its parameters.
        bits: of an element.
    """
    slices = slices_of_groups(groups, zero.stage, zero.dp_size)
    held = {True: 0, False: 0}
    for parameter in fragment:  # what tensor-parallel ranks hold alike has codes of its own
        held[shard_of(parameter) is None] += slices[parameter][dp_rank]
    if bits == 32:
        return _payloads("all_reduce", islands, "float32", sum(held.values()) * _MASTER)
    codes = sum(coded_bytes(elements, bits) for elements in held.values())
    return _payloads("all_gather", islands, "uint8", islands * codes)


def refresh(
    weights: Sequence[nn.Parameter], zero: ZeroSettings, islands: int, dp_rank: int
) -> Payloads:
    """What islands exchange where dense gradients of the whole batch are asked for.

    Args:
        weights: whose gradients, in the model's order; of what is cut over tensor-parallel ranks
            this rank's part. They may be without memory.
        zero: of one island.
        islands: how many there are.
        dp_rank: the rank's place among the copies of its island.
    """
    # gradients are complete in the opposite order, and copies take turns
    own = list(weights)[::-1][dp_rank :: zero.dp_size]
    elements = sum(tp_local_shape(weight).numel() for weight in own)
    return _payloads("all_reduce", islands, "float32", elements * _MASTER, "event")


def _owners(groups: Sequence[Sequence[nn.Parameter]], zero: ZeroSettings) -> list[int]:
    """Elements of the tensors that the optimizer steps on a rank."""
    sizes, parts = [[tp_local_shape(p).numel() for p in group] for group in groups], zero.dp_size
    if zero.stage == 0:
        return [size for group in sizes for size in group]
    if zero.stage < 3:
        return [padded(sum(group), parts) // parts for group in sizes]
    return [
        flat
        for group in sizes
        for flat in sub_groups([-(-size // parts) for size in group], zero.sub_group)
    ]


def _payloads(
    operation: str, islands: int, dtype: str, payload: int, phase: str = "step"
) -> Payloads:
    return {Traffic(operation, GROUP, islands, dtype, phase): payload} if payload else {}
