"""Which vectors a switch replaces by which candidates: integers only, the same on every rank.

A layer has N = min(m, n) candidate slots per factor. Each of the r vectors of a factor holds the
vector of one slot; all other slots are parked. A plan replaces k rows of A and k columns of B, of
disjoint indices, by vectors of parked slots. Everything is a pure function of the seed and of the
few integers that `SwitchState` holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from relora_ds.randomness import Stream

Sides = tuple[np.ndarray, np.ndarray]
"""One array for A and one for B."""


@dataclass(frozen=True)
class Plan:
    """One layer's part of a switch event."""

    vectors: Sides
    """Rows of A and columns of B to replace, (k,) each; no index is in both."""
    slots: Sides
    """Candidates that take their place, (k,) each."""
    cursors: tuple[int, int]
    """`SwitchState.cursors` afterwards."""

    @property
    def count(self) -> int:
        """Vectors replaced, both factors together."""
        return sum(len(vectors) for vectors in self.vectors)


@dataclass
class SwitchState:
    """What the next plan depends on."""

    slots: Sides
    """Slot whose vector each row of A, each column of B holds; (r,) each, without repetition."""
    cursors: tuple[int, int]
    """How far the selection has come on each side."""

    def apply(self, plan: Plan) -> Sides:
        """Take note of a plan; returns the slots that are parked by it."""
        parked = []
        for held, vectors, slots in zip(self.slots, plan.vectors, plan.slots, strict=True):
            parked.append(held[vectors])
            held[vectors] = slots
        self.cursors = plan.cursors
        return parked[0], parked[1]


def switch_counts(expected: float, layers: int, seed: int, step: int) -> list[int]:
    """Vectors per factor that each layer replaces: `expected`, rounded up or down by chance."""
    whole = int(expected)
    chance = Stream(seed, "switch.count", event=step).uniform(0, layers)
    return [whole + int(value < expected - whole) for value in chance.tolist()]


class Selection(ABC):
    """The order in which one layer's vectors and candidates are taken.

    Args:
        name: full name of the projection.
        rank: vectors per factor, r.
        num_slots: candidates per factor, N > r.
        seed: the run's seed.
    """

    def __init__(self, name: str, rank: int, num_slots: int, seed: int) -> None:
        assert rank < num_slots, (rank, num_slots)
        self.name = name
        self.rank = rank
        self.num_slots = num_slots
        self.seed = seed

    @abstractmethod
    def initial(self) -> SwitchState:
        """The state before the first event."""

    @abstractmethod
    def plan(self, state: SwitchState, step: int, count: int, live: Sides) -> Plan:
        """Choose at most `count` vectors of each factor.

        Args:
            step: updates completed before the event.
            live: which rows of A and columns of B are not frozen, bool, (r,) each; an index at
                which either is frozen is left alone.
        """


class RandomSelection(Selection):
    """Vectors at random; candidates in random order, none twice before all were used.

    The cursor of a side counts the candidates that had their turn. The first N - r turns belong to
    the slots that were not active at the start, later rounds of N turns to all of them, each round
    in an order of its own. A candidate that is active when its turn comes is passed over.
    """

    def __init__(self, name: str, rank: int, num_slots: int, seed: int) -> None:
        super().__init__(name, rank, num_slots, seed)
        self._rounds: dict[str, tuple[int, np.ndarray]] = {}

    def initial(self) -> SwitchState:
        # candidates are drawn alike, so which of them come first makes no difference
        first = np.arange(self.num_slots - self.rank, self.num_slots)
        return SwitchState((first, first.copy()), (0, 0))

    def plan(self, state: SwitchState, step: int, count: int, live: Sides) -> Plan:
        words = Stream(self.seed, "switch.vectors", self.name, step).words(0, self.rank)
        order = words.argsort().numpy()
        free = order[(live[0] & live[1])[order]]
        count = min(count, len(free) // 2, self.num_slots - self.rank)
        slots, cursors = [], []
        for side, held, cursor in zip("AB", state.slots, state.cursors, strict=True):
            chosen, reached = self._next(side, held, cursor, count)
            slots.append(chosen)
            cursors.append(reached)
        return Plan(
            (free[:count], free[count : 2 * count]), (slots[0], slots[1]), (cursors[0], cursors[1])
        )

    def _next(self, side: str, held: np.ndarray, cursor: int, count: int) -> tuple[np.ndarray, int]:
        active = set(held.tolist())
        chosen: list[int] = []
        for slot in self._turns(side, cursor):
            if len(chosen) == count:
                break
            cursor += 1
            if slot not in active:
                active.add(slot)
                chosen.append(slot)
        return np.array(chosen, dtype=np.int64), cursor

    def _turns(self, side: str, cursor: int) -> Iterator[int]:
        first = self.num_slots - self.rank
        while True:
            number, at = (0, cursor) if cursor < first else divmod(cursor - first, self.num_slots)
            number += cursor >= first
            order = self._round(side, number)
            yield from order[at:].tolist()
            cursor += len(order) - at

    def _round(self, side: str, number: int) -> np.ndarray:
        known = self._rounds.get(side)
        if known is None or known[0] != number:
            size = self.num_slots - self.rank if number == 0 else self.num_slots
            stream = Stream(self.seed, f"switch.candidates_{side}", self.name, number)
            known = number, stream.permutation(size)(np.arange(size))
            self._rounds[side] = known
        return known[1]


class RingSelection(Selection):
    """The order of the authors' code: both factors and both pools are run through as rings.

    The cursor of a side counts its switched vectors. The two rings move in lock-step, so of N^2
    pairs of candidates only 2 N ever meet.
    """

    def initial(self) -> SwitchState:
        first = np.arange(self.num_slots - self.rank, self.num_slots)
        return SwitchState((first, np.roll(first, self.rank // 2)), (0, 0))

    def plan(self, state: SwitchState, step: int, count: int, live: Sides) -> Plan:
        pointers = state.cursors[0] % self.rank, (state.cursors[1] + self.rank // 2) % self.rank
        # columns of B are frozen because rows of A were switched, and the other way round
        behind = int((~live[1]).sum()), int((~live[0]).sum())
        count = min(
            count,
            self.num_slots - self.rank,
            (pointers[0] - behind[0] - pointers[1]) % self.rank,
            (pointers[1] - behind[1] - pointers[0]) % self.rank,
        )
        run = np.arange(count)
        vectors, slots = [], []
        for held, pointer in zip(state.slots, pointers, strict=True):
            vectors.append((pointer + run) % self.rank)
            slots.append((held[pointer - 1] + 1 + run) % self.num_slots)
        cursors = state.cursors[0] + count, state.cursors[1] + count
        return Plan((vectors[0], vectors[1]), (slots[0], slots[1]), cursors)


SELECTIONS: dict[Literal["random", "ring"], type[Selection]] = {
    "random": RandomSelection,
    "ring": RingSelection,
}


class PairCensus:
    """Which pairs of candidates, one of A and one of B, have been trained together.

    Args:
        num_slots: candidates per factor, N.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._met = np.zeros((num_slots, num_slots), dtype=bool)

    def note(self, slots: Sides) -> None:
        """Count the pairs that are active now."""
        self._met[slots] = True

    @property
    def pairs(self) -> int:
        """Distinct pairs so far."""
        return int(self._met.sum())

    def tensor(self) -> torch.Tensor:
        """One bit per pair, uint8."""
        return torch.from_numpy(np.packbits(self._met))

    def load(self, bits: torch.Tensor) -> None:
        """Restore what `tensor` returned."""
        flat = np.unpackbits(bits.numpy(), count=self._num_slots**2)
        self._met = flat.astype(bool).reshape(self._num_slots, self._num_slots)
