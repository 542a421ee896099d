"""Bytes that matrix-wise optimizers exchange in one update, in closed form. Pure.

Sums are all-reduced over the processes that hold slices of a matrix: those that ZeRO slices over,
from stage 1 on, and those of the tensor-parallel group, where it shards the matrix. A matrix that
travels whole goes to its owner from every process that holds a slice of it, and back: an owner
receives what it lacks and returns it, the others send their slice and receive it. All of it is in
fp32, in the phase `step`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from relora_ds.accounting.recorder import Traffic
from relora_ds.optim.matrix import Exchanged, MatrixOptimizer
from relora_ds.parallel.ownership import owners_of, slices_of_groups
from relora_ds.parallel.shape import global_shape, shard_of, tp_local_shape
from relora_ds.parallel.zero import ZeroSettings

_BYTES = 4


@dataclass(frozen=True)
class GroupExchange:
    """Elements that one process exchanges with one group in an update."""

    sums: int = 0
    """Added up over the group."""
    moved: int = 0
    """Sent to others as slices of whole matrices; as many are received."""


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
            Traffic("send", group, size, "float32", "step"): _BYTES * exchange.moved,
            Traffic("recv", group, size, "float32", "step"): _BYTES * exchange.moved,
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
    owners = owners_of(rules, [slices[matrix] for matrix in rules], sizes[1])
    owned_by = dict(zip(rules, owners, strict=True))
    sums, moved, within_sums, within_moved = 0, 0, 0, 0
    for matrix, asked in _asked(model, rules):
        (owner, tp_owner), mine = owned_by[matrix], slices[matrix][dp_rank]
        whole, everything = tp_local_shape(matrix).numel(), global_shape(matrix).numel()
        sums += asked.sums
        moved += asked.wholes * (whole - mine if owner == dp_rank else mine)
        if shard_of(matrix) is not None:
            within_sums += asked.sums
            part = everything - whole if tp_owner == place.tp_rank else whole
            within_moved += asked.wholes * part if owner == dp_rank else 0
    sliced = GroupExchange(sums, moved) if zero.stage else NOTHING
    return MatrixTraffic(sliced, GroupExchange(within_sums, within_moved))


def most_matrix_traffic(
    model: nn.Module,
    groups: Sequence[Sequence[nn.Parameter]],
    rules: Mapping[nn.Parameter, MatrixOptimizer],
    zero: ZeroSettings,
    sizes: tuple[int, int],
) -> MatrixTraffic:
    """The most that any process exchanges with either group; arguments as in `matrix_traffic`."""
    places = [Place(dp, tp) for dp in range(sizes[0]) for tp in range(sizes[1])]
    found = [matrix_traffic(model, groups, rules, zero, sizes, place) for place in places]
    return MatrixTraffic(
        max((each.sliced for each in found), key=lambda exchange: exchange.moved),
        max((each.sharded for each in found), key=lambda exchange: exchange.moved),
    )


def _asked(
    model: nn.Module, rules: Mapping[nn.Parameter, MatrixOptimizer]
) -> Iterator[tuple[nn.Parameter, Exchanged]]:
    """What is asked for in an update: the matrix that it is about (a pair's first one), and how
    much."""
    matrices: dict[MatrixOptimizer, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter in rules:
            matrices.setdefault(rules[parameter], {})[name] = parameter
    for rule, named in matrices.items():
        for unit in rule.units(list(named)):
            asked = rule.exchanged([global_shape(named[name]) for name in unit])
            yield named[unit[0]], asked
