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
        frozen: elements of the slice that keep their values, bool, 1-D; None where all are trained.
            Only pairs of factors have any.
    """

    matrix: MatrixSlice
    master: torch.Tensor
    grad: torch.Tensor
    step: int
    lr: float
    weight_decay: float
    frozen: torch.Tensor | None = None

    def live_grad(self) -> torch.Tensor:
        """The gradient, zero where the slice is frozen."""
        return self.grad if self.frozen is None else self.grad.masked_fill(self.frozen, 0.0)

    def move(self, direction: torch.Tensor) -> None:
        """Decay the slice and take `lr` times a direction off it; what is frozen stays as it is."""
        # a choice, as an index of what is frozen would have the host wait for it
        moved = self.master if self.frozen is None else self.master.clone()
        moved.mul_(1 - self.lr * self.weight_decay).add_(direction, alpha=-self.lr)
        if self.frozen is not None:
            self.master.copy_(torch.where(self.frozen, self.master, moved))


@dataclass(frozen=True)
class Sum:
    """Asks for the sum of a tensor over all ranks that hold slices of the matrix."""

    value: torch.Tensor
    """This rank's summand; of one shape and dtype on all ranks."""


MatrixFunction = Callable[..., tuple[torch.Tensor, ...]]
"""From stacks (batch, m, n) of whole tensors, one stack for every tensor that travels, to a stack
for every matrix. What is computed of one place of the batch does not depend on the others."""


@dataclass(frozen=True)
class OfWhole:
    """Asks for this rank's slices of a function of a whole matrix, or of both factors of a pair.

    Their owner alone holds them whole, and computes the function. Those of equal shapes that ask
    for the same function are computed together. The answer is a tuple: a slice per matrix, 1-D.
    """

    values: Sequence[Sequence[torch.Tensor]]
    """By matrix: this rank's slices of tensors that have the matrix's shape, 1-D."""
    function: MatrixFunction
    """Takes all of these tensors whole, in order."""


Request = Sum | OfWhole
Steps = Generator[Request, Any, None]


@dataclass(frozen=True)
class Exchanged:
    """What one update of one matrix, or of a pair, asks of the other ranks."""

    sums: int = 0
    """Elements of all `Sum`s, 4 bytes each."""
    to_owner: int = 0
    """Tensors of each matrix's shape that travel to its owner."""
    from_owner: int = 0
    """Tensors of each matrix's shape that travel back."""


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
        odd = [layer for layer, factors in found.items() if factors.keys() != PAIR]
        if odd:
            raise ValueError(f"{odd[0]} has no lora_A and lora_B in one group of parameters")
        return [(factors["lora_A"], factors["lora_B"]) for factors in found.values()]

    def state_elements(self, shape: torch.Size) -> int:
        """Elements of the whole state of one matrix, every tensor once."""
        return sum(tensor.shape.numel() for tensor in self.state(shape).values())


PAIR = {"lora_A", "lora_B"}
"""Last parts of the names of a pair's factors."""


class MatrixExchange(Protocol):
    """What ranks exchange for matrix-wise updates; the engine provides it."""

    def sums(
        self, matrices: Sequence[MatrixSlice], values: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Sums over the ranks that hold slices of each matrix, all of them in few collectives."""
        ...

    def of_wholes(
        self, units: Sequence[Unit], requests: Sequence[OfWhole]
    ) -> list[tuple[torch.Tensor, ...]]:
        """This rank's slices of what the owner of each unit makes of it, 1-D, one per matrix."""
        ...


Unit = Sequence[MatrixSlice]
"""What one call of `update` is about: a matrix, or both factors of a pair."""


def drive(updates: Sequence[tuple[Unit, Steps]], exchange: MatrixExchange) -> None:
    """Run many updates side by side and answer their requests phase by phase.

    Args:
        updates: what a generator updates, and the generator. Of a pair a `Sum` is about the first.
        exchange: between the ranks that hold the matrices.
    """
    waiting: list[tuple[Unit, Steps, Any]] = [(unit, steps, None) for unit, steps in updates]
    while waiting:
        asked: list[tuple[Unit, Steps, Request]] = []
        for unit, steps, answer in waiting:
            try:
                asked.append((unit, steps, steps.send(answer)))
            except StopIteration:
                continue
        waiting = _answer(asked, exchange)


def _answer(
    asked: Sequence[tuple[Unit, Steps, Request]], exchange: MatrixExchange
) -> list[tuple[Unit, Steps, Any]]:
    sums = [(u, s, r) for u, s, r in asked if isinstance(r, Sum)]
    wholes = [(u, s, r) for u, s, r in asked if isinstance(r, OfWhole)]
    answered: list[tuple[Unit, Steps, Any]] = []
    if sums:
        totals = exchange.sums([unit[0] for unit, _, _ in sums], [r.value for _, _, r in sums])
        answered += [(u, s, v) for (u, s, _), v in zip(sums, totals, strict=True)]
    if wholes:
        found = exchange.of_wholes([unit for unit, _, _ in wholes], [r for _, _, r in wholes])
        answered += [(u, s, v) for (u, s, _), v in zip(wholes, found, strict=True)]
    return answered


def units_of(rules: Mapping[str, MatrixOptimizer]) -> list[tuple[str, ...]]:
    """What is updated together, by full name: matrices or pairs, those of one optimizer in a row.

    Args:
        rules: the optimizer of every matrix, by full name.
    """
    named: dict[MatrixOptimizer, list[str]] = {}
    for name, rule in rules.items():
        named.setdefault(rule, []).append(name)
    return [unit for rule, names in named.items() for unit in rule.units(names)]


_IN_CACHE = 2**17
"""Elements of the tensors that a host computes a function of together. What is computed on the way
stays in a core's cache then, and in memory that is not given back in between."""
_AT_ONCE = 2**24
"""The same on a device, which wants many matrices at a time, but has to have room for them."""


def in_batches(
    tensors: Sequence[Sequence[torch.Tensor]], functions: Sequence[MatrixFunction]
) -> list[tuple[torch.Tensor, ...]]:
    """Each function of its tensors (m, n); those of one function and shapes are computed
    together, as many as fit."""
    groups: dict[tuple[MatrixFunction, tuple[torch.Size, ...]], list[int]] = {}
    for number, (each, function) in enumerate(zip(tensors, functions, strict=True)):
        groups.setdefault((function, tuple(t.shape for t in each)), []).append(number)
    found: dict[int, tuple[torch.Tensor, ...]] = {}
    for (function, shapes), numbers in groups.items():
        limit = _IN_CACHE if tensors[numbers[0]][0].device.type == "cpu" else _AT_ONCE
        together = max(1, limit // sum(shape.numel() for shape in shapes))
        for first in range(0, len(numbers), together):
            chosen = numbers[first : first + together]
            stacks = [torch.stack([tensors[n][at] for n in chosen]) for at in range(len(shapes))]
            values = function(*stacks)
            found |= dict(zip(chosen, zip(*values, strict=True), strict=True))
    return [found[number] for number in range(len(tensors))]
