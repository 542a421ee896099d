"""Saved runs and tensor parallelism: the whole from the ranks' parts, and a rank's part of a whole.

Slices are of flattened parameters, so one that was cut along its columns has to be put together
before it can be sliced. The parameter that was read last is kept, because its slices come in turn.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from relora_ds.checkpoint.inventory import Inventory
from relora_ds.checkpoint.saved_state import SavedState
from relora_ds.parallel.shape import TPShard


class _Translated(SavedState):
    """A state whose parameters have other shapes than those it is read from."""

    def __init__(self, inventory: Inventory, source: SavedState) -> None:
        super().__init__(inventory, source.completed, source.clocks, {})
        self._last: tuple[str, str] = ("", "")
        self._value = torch.empty(0)

    def read(self, kind: str, name: str, start: int, length: int) -> torch.Tensor:
        return self._flat(kind, name)[start : start + length]

    def frozen(self, name: str, start: int, length: int) -> torch.Tensor:
        return self._flat("frozen", name)[start : start + length]

    def working(self, name: str) -> torch.Tensor:
        shape = (self.inventory.trained | self.inventory.frozen)[name]
        return self._flat("working", name).view(shape)

    def _flat(self, kind: str, name: str) -> torch.Tensor:
        if self._last != (kind, name):
            self._value = self._make(kind, name).reshape(-1)
            self._last = kind, name
        return self._value

    @abstractmethod
    def _make(self, kind: str, name: str) -> torch.Tensor:
        """All values of one kind of a parameter, in its shape here."""


def _all_of(state: SavedState, kind: str, name: str) -> torch.Tensor:
    """Everything that a state has of one kind, in the parameter's shape there."""
    shape = (state.inventory.trained | state.inventory.frozen)[name]
    if kind == "working":
        return state.working(name)
    if kind == "frozen":
        return state.frozen(name, 0, shape.numel()).view(shape)
    return state.read(kind, name, 0, shape.numel()).view(shape)


class JoinedState(_Translated):
    """The whole from the parts of all ranks of a tensor-parallel group.

    Args:
        inventory: of the uncut model.
        parts: one state per rank.
        shards: which part of the whole each of its parameters is, if it is not the whole.
    """

    def __init__(
        self,
        inventory: Inventory,
        parts: Sequence[SavedState],
        shards: Sequence[Mapping[str, TPShard]],
    ) -> None:
        super().__init__(inventory, parts[0])
        self._parts, self._shards = parts, shards

    def _make(self, kind: str, name: str) -> torch.Tensor:
        first = _all_of(self._parts[0], kind, name)
        if name not in self._shards[0]:
            return first
        whole = first.new_empty(self._shards[0][name].global_shape)
        for part, shards in zip(self._parts, self._shards, strict=True):
            shards[name].place(_all_of(part, kind, name), whole)
        return whole

    def matrix_state(self, key: str, name: str) -> torch.Tensor:
        holders = [part for part in self._parts if part.holds_matrix_state(key, name)]
        return (holders or self._parts)[0].matrix_state(key, name)

    def holds_matrix_state(self, key: str, name: str) -> bool:
        return any(part.holds_matrix_state(key, name) for part in self._parts)


class PartOfState(_Translated):
    """What one rank of a tensor-parallel group holds of a whole.

    Args:
        whole: the state of the uncut model.
        shards: the rank's parts.
    """

    def __init__(self, whole: SavedState, shards: Mapping[str, TPShard]) -> None:
        def cut(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
            return {
                name: shards[name].shape if name in shards else shape
                for name, shape in shapes.items()
            }

        known = whole.inventory
        groups = [cut(group) for group in known.groups]
        super().__init__(replace(known, groups=groups, frozen=cut(known.frozen)), whole)
        self._whole, self._shards = whole, shards

    def matrix_state(self, key: str, name: str) -> torch.Tensor:
        return self._whole.matrix_state(key, name)

    def holds_matrix_state(self, key: str, name: str) -> bool:
        return self._whole.holds_matrix_state(key, name)

    def _make(self, kind: str, name: str) -> torch.Tensor:
        value = _all_of(self._whole, kind, name)
        return self._shards[name].part(value) if name in self._shards else value
