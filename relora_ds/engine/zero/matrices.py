"""Matrix-wise optimizers on a layout: where matrices lie, who owns what, how ranks exchange.

Two sets of ranks hold slices of a matrix: those that ZeRO slices the optimizer's tensors over, and,
of a parameter that tensor parallelism shards, the ranks of that group. One rank among them owns the
state that one rank holds, and makes the matrix whole where an optimizer asks for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.distributed import ProcessGroup

from relora_ds.engine.zero.layout import Layout
from relora_ds.optim.grouped import PlacedMatrix
from relora_ds.optim.matrix import (
    MatrixExchange,
    MatrixOptimizer,
    MatrixSlice,
    OfWhole,
    Unit,
    in_batches,
    units_of,
)
from relora_ds.optim.rectangles import rectangles
from relora_ds.optim.vector_adamw import storage_key
from relora_ds.parallel.ownership import owners_of
from relora_ds.parallel.shape import global_shape, shard_of, tp_local_shape
from relora_ds.parallel.tensor import TensorParallel
from relora_ds.parallel.wholes import Wholes


class ZeroMatrices(MatrixExchange):
    """All matrices of an engine that are updated matrix-wise, and their exchanges.

    Args:
        layout: where masters and gradients are.
        rules: the matrix-wise optimizer of every parameter that has one, in the groups' order.
        names: full names of parameters.
        tp: the tensor-parallel group.
    """

    def __init__(
        self,
        layout: Layout,
        rules: Mapping[nn.Parameter, MatrixOptimizer],
        names: Mapping[nn.Parameter, str],
        tp: TensorParallel,
    ) -> None:
        self._layout = layout
        self._group = layout.partition_group
        self._tp = tp
        self._rules = {names[parameter]: rule for parameter, rule in rules.items()}
        self._sizes = {names[parameter]: tp_local_shape(parameter) for parameter in rules}
        self._dims = {names[p]: s.dim for p in rules if (s := shard_of(p)) is not None}
        self._units = units_of(self._rules)
        self._beside = {
            name
            for unit in self._units
            for name in unit
            if name not in self._dims and any(other in self._dims for other in unit)
        }
        """Matrices that every tensor-parallel rank has whole, of units in which others are cut."""
        self._slices, self._shards = self._find_owners(layout, rules, names)
        self.by_parameter: dict[nn.Parameter, MatrixSlice] = {}
        """This rank's slice of every matrix."""
        for parameter, rule in rules.items():
            self.by_parameter[parameter] = self._slice(layout, parameter, names[parameter], rule)
        self.placed = self._place(layout)
        """What lies in every tensor that the optimizer steps, by its storage, in order."""

    def _find_owners(
        self,
        layout: Layout,
        rules: Mapping[nn.Parameter, MatrixOptimizer],
        names: Mapping[nn.Parameter, str],
    ) -> tuple[Wholes | None, Wholes | None]:
        """Who holds what in the group that ZeRO slices over, and in the tensor-parallel group.

        A collective call. A group of one has no owners.
        """
        if not rules:
            return None, None
        device = layout.placements[next(iter(rules))].owner.device
        held = [layout.placements[parameter].stretch.length for parameter in rules]
        slices = _on_all(held, self._group, device)
        agreed = torch.tensor(slices, device=device)
        if self._tp.group is not None:  # shards may differ by a row, but their ranks must agree
            torch.distributed.broadcast(agreed, group=self._tp.group, group_src=0)
        owners = self._owners(rules, names, agreed)
        parts = _on_all([tp_local_shape(p).numel() for p in rules], self._tp.group, device)
        groups: list[Wholes | None] = []
        for group, lengths, place in ((self._group, slices, 0), (self._tp.group, parts, 1)):
            found = {
                names[parameter]: (each, owner[place])
                for parameter, each, owner in zip(rules, lengths, owners, strict=True)
            }
            if group is None or torch.distributed.get_world_size(group) == 1:
                groups.append(None)
            else:
                groups.append(Wholes(group, found))
        return groups[0], groups[1]

    def _owners(
        self,
        rules: Mapping[nn.Parameter, MatrixOptimizer],
        names: Mapping[nn.Parameter, str],
        slices: torch.Tensor,
    ) -> list[tuple[int, int]]:
        """The owner of every matrix, from the elements that ranks hold of it (matrices, ranks)."""
        matrices = {names[parameter]: parameter for parameter in rules}
        places = {name: place for place, name in enumerate(matrices)}
        units = [[matrices[name] for name in unit] for unit in self._units]
        held = [slices[[places[name] for name in unit]].sum(0).tolist() for unit in self._units]
        found: dict[str, tuple[int, int]] = {}
        for unit, owner in zip(self._units, owners_of(units, held, self._tp.size), strict=True):
            found |= dict.fromkeys(unit, owner)
        return [found[name] for name in matrices]

    def _slice(
        self, layout: Layout, parameter: nn.Parameter, name: str, rule: MatrixOptimizer
    ) -> MatrixSlice:
        stretch = layout.placements[parameter].stretch
        cols = tp_local_shape(parameter)[1]
        first = [0, 0]
        shard = shard_of(parameter)
        if shard is not None:
            assert isinstance(shard.index, range), "matrices are sharded in consecutive parts"
            first[shard.dim] = shard.index.start
        parts = tuple(rectangles(stretch.start, stretch.length, cols, *first))
        matrix = MatrixSlice(name, global_shape(parameter), parts, self._owns(name))
        device = layout.placements[parameter].owner.device
        for key, declared in rule.state(matrix.shape).items():
            shape: Sequence[int] = declared.shape
            if declared.held == "slice":
                assert declared.shape == matrix.shape, f"{key} is sliced, but has another shape"
                shape = (stretch.length,)
            if declared.held != "owner" or matrix.owner:
                matrix.state[key] = torch.zeros(shape, dtype=declared.dtype, device=device)
        return matrix

    def _owns(self, name: str) -> bool:
        cut = name in self._dims or name in self._beside
        alone = self._shards is None or not cut or self._shards.owns(name)
        return alone and (self._slices is None or self._slices.owns(name))

    def _place(self, layout: Layout) -> dict[int, list[PlacedMatrix]]:
        placed: dict[int, list[PlacedMatrix]] = {}
        for parameter, matrix in self.by_parameter.items():
            placement = layout.placements[parameter]
            found = placed.setdefault(storage_key(placement.owner), [])
            rule = self._rules[matrix.name]
            found.append(PlacedMatrix(matrix, rule, placement.stretch.offset))
        return placed

    def sums(
        self, matrices: Sequence[MatrixSlice], values: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for dtype in {value.dtype for value in values}:
            chosen = [n for n, value in enumerate(values) if value.dtype == dtype]
            # those that tensor-parallel ranks add to lie in front
            chosen.sort(key=lambda n: matrices[n].name not in self._dims)
            flat = torch.cat([values[n].reshape(-1) for n in chosen])
            if self._group is not None:
                torch.distributed.all_reduce(flat, group=self._group)
            sharded = [n for n in chosen if matrices[n].name in self._dims]
            front = flat[: sum(values[n].numel() for n in sharded)]
            if front.numel():
                front.copy_(self._tp.sum(front.clone()))
            parts = flat.split([values[n].numel() for n in chosen])
            found |= {n: part.view_as(values[n]) for n, part in zip(chosen, parts, strict=True)}
        return [found[n] for n in range(len(values))]

    def of_wholes(
        self, units: Sequence[Unit], requests: Sequence[OfWhole]
    ) -> list[tuple[torch.Tensor, ...]]:
        slices = {
            matrix.name: values
            for unit, request in zip(units, requests, strict=True)
            for matrix, values in zip(unit, request.values, strict=True)
        }
        here: dict[str, torch.Tensor] = {}
        wholes: dict[str, list[torch.Tensor]] = {name: [] for name in slices}
        for number in range(max(len(values) for values in slices.values())):
            flat = {name: v[number] for name, v in slices.items() if number < len(v)}
            local = flat if self._slices is None else self._slices.gather(flat)
            here |= local
            for name, whole in self._join_shards(
                {n: flat.view(self._sizes[n]) for n, flat in local.items()}
            ).items():
                wholes[name].append(whole)
        results = self._compute(units, requests, wholes)
        found = self._cut_shards(results, here)
        flat = {name: found[name].reshape(-1) for name in here}
        first = {name: values[0] for name, values in slices.items()}
        parts = flat if self._slices is None else self._slices.scatter(flat, first)
        return [tuple(parts[matrix.name] for matrix in unit) for unit in units]

    def _compute(
        self,
        units: Sequence[Unit],
        requests: Sequence[OfWhole],
        wholes: Mapping[str, Sequence[torch.Tensor]],
    ) -> dict[str, torch.Tensor]:
        """The functions of those units that this rank owns, by matrix."""
        owned, tensors, functions = [], [], []
        for unit, request in zip(units, requests, strict=True):
            if all(wholes[matrix.name] for matrix in unit):
                owned.append(unit)
                tensors.append([tensor for matrix in unit for tensor in wholes[matrix.name]])
                functions.append(request.function)
        found: dict[str, torch.Tensor] = {}
        for unit, values in zip(owned, in_batches(tensors, functions), strict=True):
            found |= {m.name: value for m, value in zip(unit, values, strict=True)}
        return found

    def _join_shards(self, local: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole matrices from the parts that tensor-parallel ranks hold, on their owners."""
        if self._shards is None:
            return dict(local)
        rows = {n: part.movedim(self._dims[n], 0) for n, part in local.items() if n in self._dims}
        found = self._shards.gather({name: part.reshape(-1) for name, part in rows.items()})
        wholes = {name: part for name, part in local.items() if name not in self._dims}
        for name, flat in found.items():
            wholes[name] = flat.view(-1, *rows[name].shape[1:]).movedim(0, self._dims[name])
        return wholes

    def _cut_shards(
        self, wholes: Mapping[str, torch.Tensor], local: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The way back: this rank's parts of what the owners computed; like `local` by name."""
        if self._shards is None:
            return dict(wholes)
        rows = {
            n: whole.movedim(self._dims[n], 0) for n, whole in wholes.items() if n in self._dims
        }
        spread = {name: part for name, part in local.items() if name in self._beside}
        cut = self._dims.keys() | self._beside
        parts = {name: whole for name, whole in wholes.items() if name not in cut}
        parts |= self._shards.spread(wholes, spread)
        found = self._shards.scatter(
            {name: row.reshape(-1) for name, row in rows.items()},
            {name: part for name, part in local.items() if name in self._dims},
        )
        for name, flat in found.items():
            m, n = self._sizes[name]
            across = n if self._dims[name] == 0 else m
            parts[name] = flat.view(-1, across).movedim(0, self._dims[name])
        return parts

    def refresh(self, names: Sequence[str]) -> None:
        """Take this rank's masters of matrices, by full name, over into its working weights."""
        for parameter, matrix in self.by_parameter.items():
            if matrix.name in names:
                self._layout.take_master(parameter)

    def moments(self) -> dict[nn.Parameter, tuple[torch.Tensor, ...]]:
        """This rank's slices of the state that has its matrix's shape, live and 1-D."""
        found = {}
        for parameter, matrix in self.by_parameter.items():
            declared = self._rules[matrix.name].state(matrix.shape).items()
            found[parameter] = tuple(matrix.state[key] for key, s in declared if s.held == "slice")
        return found

    def replicated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """State that all data-parallel ranks of a shard hold alike, by name."""
        for name, key, tensor, held in self._state():
            if held == "everyone" or self._group is None:
                yield f"{name} ({key})", tensor

    def shared(self) -> Iterator[tuple[str, torch.Tensor]]:
        """State that all tensor-parallel ranks of one data-parallel rank hold alike, by name."""
        for name, key, tensor, held in self._state():
            if held == "everyone" or name not in self._dims:
                yield f"{name} ({key})", tensor

    def side_tensors(self) -> dict[str, torch.Tensor]:
        """Live state that is saved once per tensor-parallel rank, by the names in a checkpoint."""
        return {
            f"{STATE_PREFIX}.{name}.{key}": tensor
            for name, key, tensor, held in self._state()
            if held == "everyone" or self._group is None
        }

    def side_slices(self) -> dict[str, torch.Tensor]:
        """Live state that this rank saves for itself, by the names in a checkpoint."""
        return {
            f"{STATE_PREFIX}.{name}.{key}": tensor
            for name, key, tensor, held in self._state()
            if held != "everyone" and self._group is not None
        }

    def _state(self) -> Iterator[tuple[str, str, torch.Tensor, str]]:
        for matrix in self.by_parameter.values():
            declared = self._rules[matrix.name].state(matrix.shape)
            for key, tensor in matrix.state.items():
                yield matrix.name, key, tensor, declared[key].held


STATE_PREFIX = "optimizer"
"""First part of a name of matrix-wise state in a checkpoint; parameter and tensor follow."""


def _on_all(
    counts: Sequence[int], group: ProcessGroup | None, device: torch.device
) -> list[list[int]]:
    """Each number as every rank of a group has it."""
    mine = torch.tensor(counts, device=device)
    if group is None:
        return mine.unsqueeze(1).tolist()
    everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(everyone, mine, group=group)
    return torch.stack(everyone, dim=1).tolist()
