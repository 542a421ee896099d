"""Bytes that matrix-wise optimizers exchange in one update, in closed form. Pure.

Sums are all-reduced over the processes that hold slices of a matrix: those that ZeRO slices over,
from stage 1 on, and those of the tensor-parallel group, where it shards the matrix. A matrix that
travels whole goes to its owner from every process that holds a slice of it, and back: an owner
receives what it lacks and returns it, the others send their slice and receive it. The factor of a
pair that a tensor-parallel group does not cut comes back from the owner of the pair alone. All of
it is in fp32, in the phase `step`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from relora_ds.accounting.recorder import Traffic
from relora_ds.optim.matrix import Exchanged, MatrixOptimizer, units_of
from relora_ds.parallel.ownership import owners_of, slices_of_groups
from relora_ds.parallel.shape import global_shape, shard_of, tp_local_shape
from relora_ds.parallel.zero import ZeroSettings

_BYTES = 4


@dataclass(frozen=True)
class GroupExchange:
    """Elements that one process exchanges with one group in an update."""

    sums: int = 0
    """Added up over the group."""
    sent: int = 0
    """Sent to others as slices of whole matrices."""
    received: int = 0
    """Received from others, likewise."""

    @property
    def moved(self) -> int:
        """Sent and received."""
        return self.sent + self.received


NOTHING = GroupExchange()


@dataclass(frozen=True)
class MatrixTraffic:
    """What the matrix-wise optimizers of a model exchange in an update."""

    sliced: GroupExchange = NOTHING
    """Over the processes that ZeRO slices optimizer states over."""
    sharded: GroupExchange = NOTHING
    """Over a tensor-parallel group."""

    @staticmethod
    def payloads(exchange: GroupExchange, group: str, size: int) -> dict[Traffic, int]:
        """Payload bytes by kind of collective.

        Args:
            group: the recorder's name of the processes.
            size: how many they are.
        """
        found = {
            Traffic("all_reduce", group, size, "float32", "step"): _BYTES * exchange.sums,
            Traffic("send", group, size, "float32", "step"): _BYTES * exchange.sent,
            Traffic("recv", group, size, "float32", "step"): _BYTES * exchange.received,
        }
        return {kind: payload for kind, payload in found.items() if payload}


class Place(NamedTuple):
    """Which process of a run is meant."""

    dp_rank: int = 0
    tp_rank: int = 0


def matrix_traffic(
    model: nn.Module,
    groups: Sequence[Sequence[nn.Parameter]],
    rules: Mapping[nn.Parameter, MatrixOptimizer],
    zero: ZeroSettings,
    sizes: tuple[int, int],
    place: Place,
) -> MatrixTraffic:
    """What one process exchanges.

    Args:
        model: a `Llama`, or a tensor-parallel rank's part of one, on any device.
        groups: its trained parameters by optimizer group.
        rules: the matrix-wise optimizer of every parameter that has one.
        zero: how the step is shared over processes.
        sizes: data-parallel and tensor-parallel processes.
        place: the process.
    """
    copies = sizes[0] if zero.stage else 1
    dp_rank = place.dp_rank if zero.stage else 0
    slices = slices_of_groups(groups, zero.stage, copies)
    units = _units(model, rules)
    held = [
        [sum(parts) for parts in zip(*(slices[m] for m in unit), strict=True)] for unit in units
    ]
    between, within = [NOTHING], [NOTHING]
    for unit, (owner, tp_owner) in zip(units, owners_of(units, held, sizes[1]), strict=True):
        asked = rules[unit[0]].exchanged([global_shape(matrix) for matrix in unit])
        sharded = [shard_of(matrix) is not None for matrix in unit]
        is_owner, is_sharded = owner == dp_rank, any(sharded)
        between.append(GroupExchange(asked.sums))
        within += [GroupExchange(asked.sums)] if is_sharded else []
        for matrix, is_cut in zip(unit, sharded, strict=True):
            part, mine = tp_local_shape(matrix).numel(), slices[matrix][dp_rank]
            between.append(_travelled(asked, is_owner, part - mine, mine))
            if not (is_owner and is_sharded):
                continue
            is_tp_owner = tp_owner == place.tp_rank
            if is_cut:
                lacking = global_shape(matrix).numel() - part
                within.append(_travelled(asked, is_tp_owner, lacking, part))
            else:
                back = asked.from_owner * part
                sent = back * (sizes[1] - 1)
                within.append(
                    GroupExchange(0, sent, 0) if is_tp_owner else GroupExchange(0, 0, back)
                )
    return MatrixTraffic(_total(between) if zero.stage else NOTHING, _total(within))


def _travelled(asked: Exchanged, is_owner: bool, lacking: int, mine: int) -> GroupExchange:
    """Of a matrix that ranks hold slices of: what its owner lacks comes in, and goes back."""
    if is_owner:
        return GroupExchange(0, asked.from_owner * lacking, asked.to_owner * lacking)
    return GroupExchange(0, asked.to_owner * mine, asked.from_owner * mine)


def _total(exchanges: Sequence[GroupExchange]) -> GroupExchange:
    return GroupExchange(
        sum(each.sums for each in exchanges),
        sum(each.sent for each in exchanges),
        sum(each.received for each in exchanges),
    )


def most_matrix_traffic(
    model: nn.Module,
    groups: Sequence[Sequence[nn.Parameter]],
    rules: Mapping[nn.Parameter, MatrixOptimizer],
    zero: ZeroSettings,
    sizes: tuple[int, int],
) -> MatrixTraffic:
    """The most that any process exchanges with either group; arguments as in `matrix_traffic`."""
    if not rules:  # whatever the number of processes, of which each would be looked at
        return MatrixTraffic(NOTHING, NOTHING)
    places = [Place(dp, tp) for dp in range(sizes[0]) for tp in range(sizes[1])]
    found = [matrix_traffic(model, groups, rules, zero, sizes, place) for place in places]
    return MatrixTraffic(
        max((each.sliced for each in found), key=lambda exchange: exchange.moved),
        max((each.sharded for each in found), key=lambda exchange: exchange.moved),
    )


def _units(
    model: nn.Module, rules: Mapping[nn.Parameter, MatrixOptimizer]
) -> list[list[nn.Parameter]]:
    """What is updated together: matrices, or both factors of pairs."""
    named = {name: p for name, p in model.named_parameters() if p in rules}
    units = units_of({name: rules[parameter] for name, parameter in named.items()})
    return [[named[name] for name in unit] for unit in units]
