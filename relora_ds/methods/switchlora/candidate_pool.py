"""The candidates that are not in use: drawn when they are first asked for, kept once trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from relora_ds.numerics.batched.draws import RowDraw, UniformRows, draw_rows
from relora_ds.numerics.batched.rows import Move, Rows, move_rows
from relora_ds.numerics.gpu import launch
from relora_ds.numerics.transfers import upload

Allocate = Callable[[Sequence[int], torch.dtype], torch.Tensor]
"""Shape and dtype -> zeros where parked vectors are kept."""

_CHUNKS = 8


class CandidatePool:
    """Parked vectors of one factor of one layer, in the working dtype.

    The shapes below name the span of a vector that this process keeps `width`.

    A vector gets a place of its own when it is parked for the first time; the places are allocated
    an eighth of the pool at a time. Where several processes share the places, all of them call the
    same methods in the same order and one writes. A place is never given to another vector, and
    what was parked last is remembered, so that a process that is ahead reads nothing that is being
    written.

    Args:
        num_slots: candidates of the factor.
        span: elements [start, stop) of a vector that this process keeps.
        like: a tensor with the dtype and the device of the factor.
        draw: that span of the candidates as they are before anybody trained them.
        allocate: where to keep them afterwards.
        writes: whether this process fills what it allocates.
    """

    def __init__(
        self,
        num_slots: int,
        span: tuple[int, int],
        like: torch.Tensor,
        draw: UniformRows,
        allocate: Allocate,
        writes: bool,
    ) -> None:
        self._span = slice(*span)
        self.width = span[1] - span[0]
        """Elements of a vector that are kept here."""
        self.like = like
        """Has the dtype and the device of the factor."""
        self.draw = draw
        self._allocate = allocate
        self._writes = writes
        self._place = np.full(num_slots, -1, dtype=np.int32)
        self._used = 0
        self._chunk_rows = -(-num_slots // _CHUNKS)
        self._chunks: list[torch.Tensor] = []
        # rows of the vectors that were parked last, by slot, and these vectors
        self._last_parked: tuple[dict[int, int], torch.Tensor] = {}, like

    @property
    def stored(self) -> int:
        """Vectors that have a place."""
        return self._used

    @property
    def allocated_bytes(self) -> int:
        """Size of all places, used or not."""
        return sum(chunk.numel() * chunk.element_size() for chunk in self._chunks)

    def undrawn(self, slots: np.ndarray) -> torch.Tensor:
        """Which of some slots were never used, and their numbers: int64, (2, k), on the CPU."""
        fresh = np.flatnonzero(self._place[slots] < 0)
        return torch.from_numpy(np.stack([fresh, slots[fresh]]))

    def take(self, slots: np.ndarray) -> torch.Tensor:
        """Vectors of parked slots, (k, width), on the factor's device. Nothing is waited for."""
        device, undrawn = self.like.device, self.undrawn(slots)
        return take_together(
            [(self, slots)], [undrawn if launch.usable(device) else upload(undrawn, device)]
        )[0]

    def park(self, slots: np.ndarray, vectors: torch.Tensor) -> None:
        """Keep the vectors (k, width) of slots that are no longer active."""
        park_together([(self, slots, vectors)])

    def reads(self, slots: np.ndarray, out: torch.Tensor) -> list[Move]:
        """What is to be copied into `out`, (k, width): vectors of slots that have a place."""
        last, parked = self._last_parked
        held = np.flatnonzero(self._place[slots] >= 0)
        again = np.array([int(slot) in last for slot in slots[held]], dtype=bool)
        moves = [
            (Rows(out, rows), places)
            for places, rows in self._places(slots[held[~again]], held[~again])
        ]
        if again.any():
            rows = torch.tensor([last[int(slot)] for slot in slots[held[again]]])
            moves.append((Rows(out, torch.from_numpy(held[again])), Rows(parked, rows)))
        return moves

    def writes(self, slots: np.ndarray, vectors: torch.Tensor) -> list[Move]:
        """What is to be copied of `vectors`, (k, width), to keep them for their slots."""
        for slot in slots:
            if self._place[slot] < 0:
                self._place[slot] = self._new_place()
        self._last_parked = {int(slot): row for row, slot in enumerate(slots)}, vectors
        kept = self._places(slots, np.arange(len(slots))) if self._writes else ()
        return [(places, Rows(vectors, rows)) for places, rows in kept]

    def _places(self, slots: np.ndarray, beside: np.ndarray) -> Iterator[tuple[Rows, torch.Tensor]]:
        """Where vectors of slots are, chunk by chunk, and those of the numbers beside them that
        belong there."""
        chunks, within = np.divmod(self._place[slots].astype(np.int64), self._chunk_rows)
        for number in np.unique(chunks):
            here = chunks == number
            places, numbers = (torch.from_numpy(each[here]) for each in (within, beside))
            yield Rows(self._chunks[number], places), numbers

    def _new_place(self) -> int:
        if self._used == len(self._chunks) * self._chunk_rows:
            self._chunks.append(self._allocate((self._chunk_rows, self.width), self.like.dtype))
        self._used += 1
        return self._used - 1

    def places(self) -> torch.Tensor:
        """Place of every slot, -1 for a candidate that was never used; int32."""
        return torch.from_numpy(self._place)

    def chunks(self) -> list[torch.Tensor]:
        """Vectors by place, in pieces (rows, width); live tensors."""
        rest = [self._used - number * self._chunk_rows for number in range(len(self._chunks))]
        return [chunk[:rows] for chunk, rows in zip(self._chunks, rest, strict=True)]

    def load(self, places: torch.Tensor, chunks: Sequence[torch.Tensor]) -> None:
        """Restore `places` and `chunks`, these with whole vectors."""
        self._place = places.numpy().copy()
        self._used, self._chunks = 0, []
        self._last_parked = {}, self._last_parked[1]
        for _ in range(int(self._place.max()) + 1):
            self._new_place()
        if self._writes:
            for own, saved in zip(self.chunks(), chunks, strict=True):
                own.copy_(saved[:, self._span])


def take_together(
    requests: Sequence[tuple[CandidatePool, np.ndarray]], undrawn: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Vectors of parked slots, on the factors' device. Nothing is waited for.

    Args:
        requests: pools of one type and device, and numbers of candidates.
        undrawn: what each pool says of them; on the CPU where kernels are `launch.usable` on the
            device, on the device elsewhere.

    Returns:
        (k, width) for each pool.
    """
    if not requests:
        return []
    like = requests[0][0].like
    shapes = [(len(slots), pool.width) for pool, slots in requests]
    taken = [
        part.view(shape)
        for part, shape in zip(
            like.new_empty(sum(map(math.prod, shapes))).split([math.prod(s) for s in shapes]),
            shapes,
            strict=True,
        )
    ]
    draws, moves = [], []
    for (pool, slots), which, out in zip(requests, undrawn, taken, strict=True):
        if which.numel():
            draws.append(RowDraw(pool.draw, out, which))
        moves += pool.reads(slots, out)
    draw_rows(draws, like.device)
    move_rows(moves, like.device)
    return taken


def park_together(parked: Sequence[tuple[CandidatePool, np.ndarray, torch.Tensor]]) -> None:
    """Keep vectors (k, width) of slots that are no longer active. Nothing is waited for.

    Args:
        parked: pools of one device, numbers of candidates and their vectors.
    """
    moves = [move for pool, slots, vectors in parked for move in pool.writes(slots, vectors)]
    if parked:
        move_rows(moves, parked[0][0].like.device)
