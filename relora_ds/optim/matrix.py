"""Optimizers that update matrices, not elements, on whatever slices of them a rank holds.

An element-wise optimizer works on any flat stretch. One over matrices (projected gradients,
spectral updates, column norms) needs sums over a whole matrix, or all of it. It says so here, and
knows nothing of how the matrix is sliced: `update` is a generator that works on this rank's slice
and yields whatever it needs from the other ranks, a `Sum` or a `ToOwner`. `drive` runs the updates
of many matrices side by side, so that everything they ask for in one phase travels together.

A matrix's moments need not have the matrix's shape. `state` declares them, and everything that
stores, compares, saves or plans for optimizer state asks it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch

from relora_ds.optim.rectangles import Rectangle

Needs = Literal["rows", "pair", "whole"]
Held = Literal["slice", "owner", "everyone"]


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a matrix's optimizer state; it starts as zeros.

    Args:
        shape: of the whole tensor, for the global matrix.
        held: `slice`: it has the matrix's shape and every rank holds the elements of its slice.
            `owner`: one rank holds it, the others nothing. `everyone`: all ranks hold it alike.
        dtype: of its elements.
    """

    shape: torch.Size
    held: Held
    dtype: torch.dtype = torch.float32


@dataclass
class MatrixSlice:
    """What one rank holds of one matrix, and its optimizer state.

    Args:
        name: full name of the parameter.
        shape: global shape (m, n).
        rectangles: where the elements of this rank's slice lie in the matrix; none if it is empty.
        owner: whether this rank holds the state that one rank holds.
        state: tensors by key, as declared; a `slice` is 1-D, what others hold is absent.
    """

    name: str
    shape: torch.Size
    rectangles: tuple[Rectangle, ...]
    owner: bool
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Elements of the slice."""
        return sum(part.rows * part.cols for part in self.rectangles)


@dataclass(frozen=True)
class MatrixUpdate:
    """One matrix of an update that is under way.

    Args:
        matrix: this rank's slice of it.
        master: live values of the slice, fp32, 1-D.
        grad: its gradient, reduced and clipped, 1-D.
        step: number of this update, from 1.
        lr: learning rate.
        weight_decay: decoupled decay rate.
    """

    matrix: MatrixSlice
    master: torch.Tensor
    grad: torch.Tensor
    step: int
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Sum:
    """Asks for the sum of a tensor over all ranks that hold slices of the matrix."""

    value: torch.Tensor
    """This rank's summand; of one shape and dtype on all ranks."""


@dataclass(frozen=True)
class ToOwner:
    """Asks for a whole matrix on its owner; the other ranks get None."""

    values: torch.Tensor
    """This rank's slice, 1-D."""


Request = Sum | ToOwner
Steps = Generator[Request, torch.Tensor | None, None]


class MatrixOptimizer(ABC):
    """How the matrices of one parameter group are updated."""

    needs: ClassVar[Needs]
    """`rows`: sums over slices are enough. `pair`: both factors of a projection are updated by one
    call, `lora_A` first. `whole`: a rank gathers the matrix."""

    @abstractmethod
    def state(self, shape: torch.Size) -> Mapping[str, StateTensor]:
        """Optimizer state of a matrix of this global shape, by key."""

    @abstractmethod
    def update(self, matrices: Sequence[MatrixUpdate]) -> Steps:
        """Update one matrix, or both factors of a pair, in place: their `master` and their state.

        Every rank yields the same requests in the same order, also where its slice is empty.
        """

    @abstractmethod
    def exchanged(self, shapes: Sequence[torch.Size]) -> int:
        """Elements that one update of these matrices asks for: of all `Sum`s, and m n of every
        `ToOwner`. The closed form of traffic is made of it."""

    def units(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Which parameters are updated by one call of `update`, by full name, in order.

        Raises:
            ValueError: a pair has one factor only.
        """
        if self.needs != "pair":
            return [(name,) for name in names]
        found: dict[str, dict[str, str]] = {}
        for name in names:
            layer, _, factor = name.rpartition(".")
            found.setdefault(layer, {})[factor] = name
        odd = [layer for layer, factors in found.items() if factors.keys() != _PAIR]
        if odd:
            raise ValueError(f"{odd[0]} has no lora_A and lora_B in one group of parameters")
        return [(factors["lora_A"], factors["lora_B"]) for factors in found.values()]

    def state_elements(self, shape: torch.Size) -> int:
        """Elements of the whole state of one matrix, every tensor once."""
        return sum(tensor.shape.numel() for tensor in self.state(shape).values())


_PAIR = {"lora_A", "lora_B"}


class MatrixExchange(Protocol):
    """What ranks exchange for matrix-wise updates; the engine provides it."""

    def sums(
        self, matrices: Sequence[MatrixSlice], values: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Sums over the ranks that hold slices of each matrix, all of them in few collectives."""
        ...

    def to_owners(
        self, matrices: Sequence[MatrixSlice], slices: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """Each whole matrix on its owner, None elsewhere."""
        ...


def drive(updates: Sequence[tuple[MatrixSlice, Steps]], exchange: MatrixExchange) -> None:
    """Run many updates side by side and answer their requests phase by phase.

    Args:
        updates: the matrix that a request is about (the first one of a pair), and its generator.
        exchange: between the ranks that hold the matrices.
    """
    waiting = [(matrix, steps, None) for matrix, steps in updates]
    while waiting:
        asked: list[tuple[MatrixSlice, Steps, Request]] = []
        for matrix, steps, answer in waiting:
            try:
                asked.append((matrix, steps, steps.send(answer)))
            except StopIteration:
                continue
        waiting = _answer(asked, exchange)


def _answer(
    asked: Sequence[tuple[MatrixSlice, Steps, Request]], exchange: MatrixExchange
) -> list[tuple[MatrixSlice, Steps, Any]]:
    sums = [(m, s, r.value) for m, s, r in asked if isinstance(r, Sum)]
    wholes = [(m, s, r.values) for m, s, r in asked if isinstance(r, ToOwner)]
    answered: list[tuple[MatrixSlice, Steps, Any]] = []
    for group, collect in ((sums, exchange.sums), (wholes, exchange.to_owners)):
        if group:
            found = collect([m for m, _, _ in group], [value for _, _, value in group])
            answered += [(m, s, v) for (m, s, _), v in zip(group, found, strict=True)]
    return answered
