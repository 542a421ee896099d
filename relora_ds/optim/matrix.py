"""Optimizers that update matrices, not elements, on whatever slices of them a rank holds.

An element-wise optimizer works on any flat stretch. One over matrices (projected gradients,
spectral updates, column norms) needs sums over a whole matrix, or all of it. It says so here, and
knows nothing of how the matrix is sliced: `update` is a generator that works on this rank's slice
and yields whatever it needs from the other ranks, a `Sum` or an `OfWhole`. `drive` runs the updates
of many matrices side by side, so that everything they ask for in one phase travels together.

A matrix's moments need not have the matrix's shape. `state` declares them, and everything that
stores, compares, saves or plans for optimizer state asks it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
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


MatrixFunction = Callable[[torch.Tensor], torch.Tensor]
"""From whole matrices of one shape (batch, m, n) to as many, each on its own."""


@dataclass(frozen=True)
class OfWhole:
    """Asks for this rank's slice of a function of the whole matrix.

    The matrix's owner alone holds it whole, and computes the function. Matrices of one shape that
    ask for the same function are computed together.
    """

    values: torch.Tensor
    """This rank's slice, 1-D."""
    function: MatrixFunction


Request = Sum | OfWhole
Steps = Generator[Request, torch.Tensor, None]


@dataclass(frozen=True)
class Exchanged:
    """What one update of one matrix, or of a pair, asks of the other ranks."""

    sums: int = 0
    """Elements of all `Sum`s, 4 bytes each."""
    wholes: int = 0
    """How many times the matrix travels to its owner and back."""


class MatrixOptimizer(ABC):
    """How matrices are updated: a value, so that those with equal optimizers are updated together.

    It holds settings only; what changes is in the `state` of each matrix.
    """

    needs: ClassVar[Needs]
    """`rows`: sums over slices are enough. `pair`: both factors of a projection are updated by one
    call, `lora_A` first. `whole`: the owner gathers the matrix."""

    @abstractmethod
    def state(self, shape: torch.Size) -> Mapping[str, StateTensor]:
        """Optimizer state of a matrix of this global shape, by key."""

    @abstractmethod
    def update(self, matrices: Sequence[MatrixUpdate]) -> Steps:
        """Update one matrix, or both factors of a pair, in place: their `master` and their state.

        Every rank yields the same requests in the same order, also where its slice is empty.
        """

    @abstractmethod
    def exchanged(self, shapes: Sequence[torch.Size]) -> Exchanged:
        """What one update of a matrix, or of both factors of a pair, asks for.

        The closed form of traffic is made of it.

        Args:
            shapes: global shapes of the matrices.
        """

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

    def of_wholes(
        self, matrices: Sequence[MatrixSlice], requests: Sequence[OfWhole]
    ) -> list[torch.Tensor]:
        """This rank's slices of what each matrix's owner makes of it, 1-D."""
        ...


def drive(updates: Sequence[tuple[MatrixSlice, Steps]], exchange: MatrixExchange) -> None:
    """Run many updates side by side and answer their requests phase by phase.

    Args:
        updates: the matrix that a request is about (the first one of a pair), and its generator.
        exchange: between the ranks that hold the matrices.
    """
    waiting: list[tuple[MatrixSlice, Steps, Any]] = [(m, steps, None) for m, steps in updates]
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
    sums = [(m, s, r) for m, s, r in asked if isinstance(r, Sum)]
    wholes = [(m, s, r) for m, s, r in asked if isinstance(r, OfWhole)]
    answered: list[tuple[MatrixSlice, Steps, Any]] = []
    if sums:
        found = exchange.sums([m for m, _, _ in sums], [r.value for _, _, r in sums])
        answered += [(m, s, v) for (m, s, _), v in zip(sums, found, strict=True)]
    if wholes:
        found = exchange.of_wholes([m for m, _, _ in wholes], [r for _, _, r in wholes])
        answered += [(m, s, v) for (m, s, _), v in zip(wholes, found, strict=True)]
    return answered


def in_batches(
    matrices: Sequence[torch.Tensor], functions: Sequence[MatrixFunction]
) -> list[torch.Tensor]:
    """Each function of its matrix (m, n); those of one function and shape are computed together."""
    groups: dict[tuple[MatrixFunction, torch.Size], list[int]] = {}
    for number, (matrix, function) in enumerate(zip(matrices, functions, strict=True)):
        groups.setdefault((function, matrix.shape), []).append(number)
    found: dict[int, torch.Tensor] = {}
    for (function, _), numbers in groups.items():
        values = function(torch.stack([matrices[number] for number in numbers]))
        found |= dict(zip(numbers, values, strict=True))
    return [found[number] for number in range(len(matrices))]
