"""Matrix-wise optimizers on a layout: where matrices lie, who owns what, how ranks exchange.

Two sets of ranks hold slices of a matrix: those that ZeRO slices the optimizer's tensors over, and,
of a parameter that tensor parallelism shards, the ranks of that group. One rank among them owns the
state that one rank holds; the matrices take turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import nn
from torch.distributed import ProcessGroup

from relora_ds.engine.zero.layout import Layout
from relora_ds.optim.grouped import PlacedMatrix
from relora_ds.optim.matrix import MatrixExchange, MatrixOptimizer, MatrixSlice
from relora_ds.optim.rectangles import rectangles
from relora_ds.optim.vector_adamw import storage_key
from relora_ds.parallel.shape import global_shape, shard_of, tp_local_shape
from relora_ds.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Holders:
    """The ranks that hold slices of one matrix."""

    sharded: bool
    """Whether tensor-parallel ranks hold different shards of it."""
    dp_owner: int
    """Rank of the owner within the group that ZeRO slices over."""
    tp_owner: int
    """Rank of the owner within the tensor-parallel group, where that matters."""


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
        self._group = layout.partition_group
        self._tp = tp
        self._holders: dict[str, Holders] = {}
        self._sizes: dict[str, torch.Size] = {}
        self.by_parameter: dict[nn.Parameter, MatrixSlice] = {}
        """This rank's slice of every matrix."""
        self._rules = {names[parameter]: rule for parameter, rule in rules.items()}
        turns = count()
        for parameter, rule in rules.items():
            name, turn = names[parameter], next(turns)
            self._holders[name] = self._holders_of(parameter, turn)
            self._sizes[name] = tp_local_shape(parameter)
            self.by_parameter[parameter] = self._slice(layout, parameter, name, rule)
        self.placed = self._place(layout)
        """What lies in every tensor that the optimizer steps, by its storage, in order."""

    def _holders_of(self, parameter: nn.Parameter, turn: int) -> Holders:
        sharded = shard_of(parameter) is not None
        size = 1 if self._group is None else torch.distributed.get_world_size(self._group)
        tp_size = self._tp.size if sharded else 1
        dp_owner, tp_owner = divmod(turn % (size * tp_size), tp_size)
        return Holders(sharded, dp_owner, tp_owner)

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
        holders = self._holders[name]
        rank = 0 if self._group is None else torch.distributed.get_rank(self._group)
        return rank == holders.dp_owner and (
            not holders.sharded or self._tp.rank == holders.tp_owner
        )

    def _place(self, layout: Layout) -> dict[int, list[PlacedMatrix]]:
        placed: dict[int, list[PlacedMatrix]] = {}
        for parameter, matrix in self.by_parameter.items():
            placement = layout.placements[parameter]
            found = placed.setdefault(storage_key(placement.owner), [])
            found.append(PlacedMatrix(matrix, placement.stretch.offset))
        return placed

    def sums(
        self, matrices: Sequence[MatrixSlice], values: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for dtype in {value.dtype for value in values}:
            chosen = [n for n, value in enumerate(values) if value.dtype == dtype]
            # those that tensor-parallel ranks add to lie in front
            chosen.sort(key=lambda n: not self._holders[matrices[n].name].sharded)
            flat = torch.cat([values[n].reshape(-1) for n in chosen])
            if self._group is not None:
                torch.distributed.all_reduce(flat, group=self._group)
            sharded = [n for n in chosen if self._holders[matrices[n].name].sharded]
            front = flat[: sum(values[n].numel() for n in sharded)]
            if front.numel():
                front.copy_(self._tp.sum(front.clone()))
            parts = flat.split([values[n].numel() for n in chosen])
            found |= {n: part.view_as(values[n]) for n, part in zip(chosen, parts, strict=True)}
        return [found[n] for n in range(len(values))]

    def to_owners(
        self, matrices: Sequence[MatrixSlice], slices: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        return [self._to_owner(matrix, part) for matrix, part in zip(matrices, slices, strict=True)]

    def _to_owner(self, matrix: MatrixSlice, part: torch.Tensor) -> torch.Tensor | None:
        holders, shape = self._holders[matrix.name], self._sizes[matrix.name]
        parts: list[torch.Tensor] | None = [part]
        if self._group is not None:
            parts = _gather(part, holders.dp_owner, self._group)
        local = None if parts is None else torch.cat(parts).view(shape)
        if not holders.sharded or self._tp.group is None:
            return local
        if local is None:  # the owners within every shard exchange among themselves
            return None
        dim = 0 if shape[0] != matrix.shape[0] else 1
        shards = _gather(local.movedim(dim, 0).reshape(-1), holders.tp_owner, self._tp.group)
        if shards is None:
            return None
        across = shape[1 - dim]
        return torch.cat([shard.view(-1, across) for shard in shards]).movedim(0, dim)

    def replicated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """State that all data-parallel ranks of a shard hold alike, by name."""
        for name, key, tensor, held in self._state():
            if held == "everyone" or self._group is None:
                yield f"{name} ({key})", tensor

    def shared(self) -> Iterator[tuple[str, torch.Tensor]]:
        """State that all tensor-parallel ranks of one data-parallel rank hold alike, by name."""
        for name, key, tensor, held in self._state():
            if held == "everyone" or not self._holders[name].sharded:
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


def _gather(part: torch.Tensor, owner: int, group: ProcessGroup) -> list[torch.Tensor] | None:
    """1-D parts of all ranks of a group on one of them; the parts may differ in length."""
    size = torch.distributed.get_world_size(group)
    length = torch.tensor([part.numel()], device=part.device)
    lengths = [torch.empty_like(length) for _ in range(size)]
    torch.distributed.all_gather(lengths, length, group=group)
    counts = [int(each) for each in lengths]
    padded = part.new_zeros(max(counts))
    padded[: part.numel()] = part
    mine = torch.distributed.get_rank(group) == owner
    everyone = [torch.empty_like(padded) for _ in counts] if mine else None
    where = torch.distributed.get_global_rank(group, owner)
    torch.distributed.gather(padded, everyone, dst=where, group=group)
    if everyone is None:
        return None
    return [found[:each] for found, each in zip(everyone, counts, strict=True)]
