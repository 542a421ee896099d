"""Step counts per rank vector, and where the vectors lie in a cut of a flat tensor.

Adam's step is one scalar per flat tensor under ZeRO. A method that resets the moments of a vector
needs that vector's own count. Two int32 per vector are enough, and nothing has to be advanced:
the effective step is `step - born`, and a vector is frozen while `completed steps < thaw`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from relora_ds.optim.rectangles import rectangles


class VectorClock:
    """Birth and thaw times of the vectors of one factor, identical on every rank.

    Args:
        count: number of vectors.
        axis: 0 if the rows of the parameter are the vectors, 1 if its columns are.
    """

    def __init__(self, count: int, axis: int) -> None:
        self.axis = axis
        self._born, self._thaw = both = torch.zeros(2, count, dtype=torch.int32)
        self.times: np.ndarray = both.numpy()
        """Live (2, count) int32 of births and thaws, for arithmetic on many clocks at once."""
        self.refresh()

    def refresh(self) -> None:
        """Cache what every optimizer step asks for, so that it costs no tensor operation."""
        self._same_birth = bool((self._born == self._born[0]).all())
        self._first_birth = int(self._born[0])
        self._last_thaw = int(self._thaw.max())

    @property
    def count(self) -> int:
        """Number of vectors."""
        return self._born.numel()

    def restart(self, completed: int, index: torch.Tensor | None = None) -> None:
        """Let the bias correction of vectors `index` (default: all) begin anew."""
        if index is None:
            self._born.fill_(completed)
        else:
            self._born[index] = completed
        self.refresh()

    def freeze(self, until: int, index: torch.Tensor) -> None:
        """Keep vectors `index` from training until `until` steps are completed."""
        self._thaw[index] = until
        self.refresh()

    def live(self, completed: int) -> torch.Tensor:
        """Which vectors are trained by the update after `completed` steps. Bool, (count,)."""
        return self._thaw <= completed

    def ages(self, step: int) -> torch.Tensor:
        """Effective Adam step of each vector at update number `step`. Int32, (count,)."""
        return step - self._born

    def common_birth(self, completed: int) -> int | None:
        """The birth that all vectors share, or None if they differ or one of them is frozen."""
        frozen = self._last_thaw > completed
        return self._first_birth if self._same_birth and not frozen else None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Both times as live int32 tensors; call `refresh` after writing to them."""
        return {"born": self._born, "thaw": self._thaw}


@dataclass(frozen=True)
class Block:
    """A rectangle of a parameter, as a live view into a flat tensor."""

    view: torch.Tensor
    """(rows, cols) of the rectangle."""
    row: int
    """Row of its top-left element; the number of the vector if rows are vectors."""
    col: int
    """Column of the same element, likewise."""

    def along(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        """One value per vector of the full parameter, shaped to broadcast over the view."""
        if axis == 0:
            return values[self.row : self.row + self.view.shape[0]].unsqueeze(1)
        return values[self.col : self.col + self.view.shape[1]].unsqueeze(0)


@dataclass(frozen=True)
class VectorPlaces:
    """Where one rectangle of a fragment holds some of the vectors that were asked for."""

    rectangle: int
    """Number of the rectangle."""
    index: torch.Tensor
    """int64, (2, k): which of the rectangle's vectors are meant, and which of those asked for
    these are."""


@dataclass(frozen=True)
class VectorPart:
    """A part of some vectors, in a live view of which the vectors are rows."""

    view: torch.Tensor
    """(vectors, elements)."""
    local: torch.Tensor
    """Rows of the view that are meant."""
    asked: torch.Tensor
    """Which of the vectors asked for these are."""
    span: slice
    """Elements of each vector that the view holds."""


@dataclass(frozen=True)
class Stretch:
    """Elements [start, start + length) of a flattened parameter, lying at `offset` in a flat."""

    start: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        """Offset of the first element behind it in the flat tensor."""
        return self.offset + self.length

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The stretch as a live 1-D view."""
        return flat.narrow(0, self.offset, self.length)


@dataclass(frozen=True)
class Fragment(Stretch):
    """A stretch of a parameter whose vectors have a clock.

    Args:
        cols: length of the parameter's rows.
        first: number of its first vector, where it is a part of more of them.
    """

    clock: VectorClock
    cols: int
    first: int = 0

    @cached_property
    def rectangles(self) -> tuple[tuple[int, int, int, int, int], ...]:
        """At most three of (offset in the flat, row, column, rows, width): tail of a row, whole
        rows, head of a row. Rows or columns that are vectors go by their number."""
        above, before = (self.first, 0) if self.clock.axis == 0 else (0, self.first)
        parts = rectangles(self.start, self.length, self.cols, above, before)
        return tuple((self.offset + p.at, p.row, p.col, p.rows, p.cols) for p in parts)

    def blocks(self, flat: torch.Tensor) -> Iterator[Block]:
        """The rectangles as live views."""
        for at, row, col, rows, width in self.rectangles:
            yield Block(flat.narrow(0, at, rows * width).view(rows, width), row, col)

    def find(self, index: torch.Tensor) -> tuple[VectorPlaces, ...]:
        """Where the fragment has parts of vectors `index`, int64 on the CPU; arithmetic on the
        host. At most three of them are returned, on the CPU."""
        found = []
        for number, (_, row, col, rows, width) in enumerate(self.rectangles):
            first, count = (row, rows) if self.clock.axis == 0 else (col, width)
            asked = ((index >= first) & (index < first + count)).nonzero().flatten()
            if len(asked):
                found.append(VectorPlaces(number, torch.stack([index[asked] - first, asked])))
        return tuple(found)

    def parts(self, flat: torch.Tensor, places: Sequence[VectorPlaces]) -> Iterator[VectorPart]:
        """What `find` found, as live views.

        Args:
            flat: what the fragment lies in.
            places: with their indices on its device.
        """
        blocks = list(self.blocks(flat))
        for found in places:
            block, (local, asked) = blocks[found.rectangle], found.index
            rows = self.clock.axis == 0
            view, across = (block.view, block.col) if rows else (block.view.t(), block.row)
            yield VectorPart(view, local, asked, slice(across, across + view.shape[1]))
