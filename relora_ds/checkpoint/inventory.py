"""What a saved phase consists of: parameters by name and shape, and values that come in pieces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from relora_ds.methods.interface import Method
from relora_ds.numerics.base_weight import Precision
from relora_ds.parallel.shape import tp_local_shape


@dataclass(frozen=True)
class Inventory:
    """The parameters of a phase, the same for every topology."""

    groups: list[dict[str, torch.Size]]
    """Trained parameters per optimizer group, in the group's order."""
    frozen: dict[str, torch.Size]
    edited: frozenset[str]
    """Frozen ones with an authoritative value beside the working one."""
    precision: Precision
    """How that is kept."""
    dtype: torch.dtype
    """What the model computes in."""

    @property
    def trained(self) -> dict[str, torch.Size]:
        """Of all groups."""
        return {name: shape for group in self.groups for name, shape in group.items()}


def take_inventory(
    model: nn.Module, method: Method[Any], precision: Precision, dtype: torch.dtype
) -> Inventory:
    """Names and shapes of a model, which may be without memory."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {names[id(p)]: tp_local_shape(p) for p in group.parameters}
        for group in method.parameter_groups(model)
    ]
    frozen = {n: tp_local_shape(p) for n, p in model.named_parameters() if not p.requires_grad}
    edited = frozenset(names[id(weight)] for weight in method.edited_weights(model))
    return Inventory(groups, frozen, edited, precision, dtype)


@dataclass
class Pieces:
    """A flattened tensor in consecutive parts, each sliced when it is asked for."""

    parts: list[tuple[int, int, Any]] = field(default_factory=list)
    """First element, number of elements, and what `[start:stop]` reads them from."""

    def append(self, part: Any, length: int) -> None:
        self.parts.append((self.length, length, part))

    @property
    def length(self) -> int:
        return self.parts[-1][0] + self.parts[-1][1] if self.parts else 0

    def read(self, start: int, length: int) -> torch.Tensor:
        found = []
        for first, count, part in self.parts:
            low, high = max(start, first), min(start + length, first + count)
            if low < high:
                found.append(part[low - first : high - first])
        return torch.cat(found) if found else torch.empty(0)


@dataclass(frozen=True)
class PiecesView:
    """Elements of pieces from an offset on, sliced like a tensor."""

    pieces: Pieces
    at: int

    def __getitem__(self, index: slice) -> torch.Tensor:
        return self.pieces.read(self.at + index.start, index.stop - index.start)
