"""The candidates that are not in use: drawn when they are first asked for, kept once trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from relora_ds.numerics.transfers import orderless_writes, upload

Draw = Callable[[torch.Tensor], torch.Tensor]
"""Slots (k,), int64 on the pool's device -> their initial vectors (k, width), fp32."""

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
        draw: the candidates as they are before anybody trained them.
        allocate: where to keep them afterwards.
        writes: whether this process fills what it allocates.
    """

    def __init__(
        self,
        num_slots: int,
        span: tuple[int, int],
        like: torch.Tensor,
        draw: Draw,
        allocate: Allocate,
        writes: bool,
    ) -> None:
        self._span = slice(*span)
        self._width = span[1] - span[0]
        self._dtype, self._device = like.dtype, like.device
        self._draw = draw
        self._allocate = allocate
        self._writes = writes
        self._place = np.full(num_slots, -1, dtype=np.int32)
        self._used = 0
        self._chunk_rows = -(-num_slots // _CHUNKS)
        self._chunks: list[torch.Tensor] = []
        self._last_parked: dict[int, torch.Tensor] = {}

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

    def take(self, slots: np.ndarray, undrawn: torch.Tensor | None = None) -> torch.Tensor:
        """Vectors of parked slots, (k, width), on the factor's device. Nothing is waited for.

        Args:
            slots: numbers of candidates.
            undrawn: `undrawn(slots)` on the factor's device, where it was brought there.
        """
        out = torch.empty(len(slots), self._width, dtype=self._dtype, device=self._device)
        if undrawn is None:
            undrawn = upload(self.undrawn(slots), self._device)
        where, numbers = undrawn
        if len(numbers):
            with orderless_writes():
                out[where] = self._draw(numbers).to(self._dtype)
        for row in np.flatnonzero(self._place[slots] >= 0):
            slot = int(slots[row])
            parked = self._last_parked.get(slot)
            source = self._row(int(self._place[slot])) if parked is None else parked
            out[row].copy_(source, non_blocking=True)
        return out

    def park(self, slots: np.ndarray, vectors: torch.Tensor) -> None:
        """Keep the vectors (k, width) of slots that are no longer active."""
        for slot, vector in zip(slots, vectors, strict=True):
            if self._place[slot] < 0:
                self._place[slot] = self._new_place()
            if self._writes:
                self._row(int(self._place[slot])).copy_(vector, non_blocking=True)
        self._last_parked = dict(zip(slots.tolist(), vectors, strict=True))

    def _new_place(self) -> int:
        if self._used == len(self._chunks) * self._chunk_rows:
            self._chunks.append(self._allocate((self._chunk_rows, self._width), self._dtype))
        self._used += 1
        return self._used - 1

    def _row(self, place: int) -> torch.Tensor:
        chunk, row = divmod(place, self._chunk_rows)
        return self._chunks[chunk][row]

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
        self._used, self._chunks, self._last_parked = 0, [], {}
        for _ in range(int(self._place.max()) + 1):
            self._new_place()
        if self._writes:
            for own, saved in zip(self.chunks(), chunks, strict=True):
                own.copy_(saved[:, self._span])
