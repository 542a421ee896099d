"""What a saved phase consists of: parameters by name and shape, and values that come in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from relora_ds.config.sections import OptimizerConfig
from relora_ds.methods.interface import Method, matrix_rules, optimizer_groups
from relora_ds.numerics.base_weight import Precision
from relora_ds.optim.matrix import StateTensor
from relora_ds.optim.vector_adamw import MOMENTS
from relora_ds.parallel.shape import global_shape, tp_local_shape


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
    matrix_states: Mapping[str, Mapping[str, StateTensor]] = field(default_factory=dict)
    """Declared optimizer state of every parameter that is updated matrix-wise."""

    def moments(self, name: str) -> tuple[str, ...]:
        """Keys of a trained parameter's optimizer state that has a value per element."""
        if name not in self.matrix_states:
            return MOMENTS
        declared = self.matrix_states[name].items()
        return tuple(key for key, tensor in declared if tensor.held == "slice")

    def whole_states(self, name: str) -> dict[str, StateTensor]:
        """State of a trained parameter that has a shape of its own, by key."""
        declared = self.matrix_states.get(name, {}).items()
        return {key: tensor for key, tensor in declared if tensor.held != "slice"}

    @property
    def trained(self) -> dict[str, torch.Size]:
        """Shapes of all trained parameters by name, over all groups."""
        return {name: shape for group in self.groups for name, shape in group.items()}


def take_inventory(
    model: nn.Module,
    method: Method[Any],
    precision: Precision,
    dtype: torch.dtype,
    optimizer: OptimizerConfig,
) -> Inventory:
    """Names and shapes of a model, which may be without memory.

    Args:
        model: built by the method.
        method: says what is trained and edited, and how it is updated.
        precision: how edited weights are kept.
        dtype: what the model computes in.
        optimizer: the run's settings, which the method may answer with an optimizer of its own.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    described = optimizer_groups(method, optimizer, model)
    groups = [{names[id(p)]: tp_local_shape(p) for p in group.parameters} for group in described]
    rules = matrix_rules(method, optimizer, model)
    states = {names[id(p)]: rule.state(global_shape(p)) for p, rule in rules.items()}
    frozen = {n: tp_local_shape(p) for n, p in model.named_parameters() if not p.requires_grad}
    edited = frozenset(names[id(weight)] for weight in method.edited_weights(model))
    return Inventory(groups, frozen, edited, precision, dtype, states)


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
