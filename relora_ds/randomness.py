"""Counter-based randomness: a draw is a pure function of what it is for.

Every draw depends on (run seed, purpose, full parameter name, event number, element index) and on
nothing else: not on a global generator, the process rank, the ZeRO stage, the device or the order
of calls. Any slice of a tensor can be drawn on its own, which is what a rank that owns a partition
needs, and a resumed run needs no generator state.

The generator is a keyed hash: the 128-bit key is BLAKE2b of the first four coordinates, the element
index is hashed by two rounds of the SplitMix64 finaliser (Steele, Lea and Flood, OOPSLA 2014).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
SHORTS_PER_WORD = 4
_CHUNK = 1 << 22  # elements hashed at once; bounds the int64 temporaries to 32 MiB each


def _signed(word: int) -> int:
    """The int64 with the same 64 bits: torch has no arithmetic on unsigned words."""
    return word - (1 << 64) if word >= (1 << 63) else word


def _shift_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift; torch's `>>` copies the sign bit."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _finalise(words: torch.Tensor) -> torch.Tensor:
    words = (words ^ _shift_right(words, 30)) * _signed(_MIX_1)
    words = (words ^ _shift_right(words, 27)) * _signed(_MIX_2)
    return words ^ _shift_right(words, 31)


@dataclass(frozen=True)
class Stream:
    """An endless sequence of independent 64-bit words, addressed by element index.

    Args:
        seed: the run's seed, any integer of at most 64 bits.
        purpose: what the draw is for, such as ``"init"`` or ``"lora_A"``.
        name: full name of the parameter, or "" where there is none.
        event: number of the event (merge, switch, epoch) that draws.
    """

    seed: int
    purpose: str
    name: str = ""
    event: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """Two 64-bit words that identify the stream."""
        text = f"{self.seed}\x1f{self.purpose}\x1f{self.name}\x1f{self.event}".encode()
        digest = hashlib.blake2b(text, digest_size=16).digest()
        return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")

    def words(self, start: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Elements ``[start, start + count)`` as int64 with all 64 bits random. Shape (count,)."""
        return self._words_at(torch.arange(start, start + count, dtype=torch.int64, device=device))

    def _words_at(self, index: torch.Tensor) -> torch.Tensor:
        first, second = self.key
        mixed = _finalise(index * _signed(_GOLDEN) + _signed(first))
        return _finalise(mixed ^ _signed(second))

    def uniform(self, start: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Elements ``[start, start + count)`` uniform on [0, 1), fp32, on a grid of 2**-24."""
        out = torch.empty(count, dtype=torch.float32, device=device)
        for at in range(0, count, _CHUNK):
            part = out[at : at + _CHUNK]
            part.copy_(_shift_right(self.words(start + at, part.numel(), device), 40))
        return out.mul_(2.0**-24)

    def shorts(self, start: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Elements ``[start, start + count)`` uniform on range(65536), int32: the quarters of the
        words, lowest bits first. Cheaper by four than a word each; a stream of its own."""
        first, skipped = divmod(start, SHORTS_PER_WORD)
        words = self.words(first, -(-(skipped + count) // SHORTS_PER_WORD), device)
        quarters = words.view(torch.int16)[skipped : skipped + count]
        return quarters.to(torch.int32).bitwise_and_(0xFFFF)

    def uniform_at(self, index: torch.Tensor) -> torch.Tensor:
        """Elements of the stream at given indices, int64 of any shape: fp32 of that shape on its
        device."""
        return _shift_right(self._words_at(index), 40).to(torch.float32).mul_(2.0**-24)

    def uniform_rows(self, rows: torch.Tensor, width: int, start: int, stop: int) -> torch.Tensor:
        """Columns ``[start, stop)`` of some rows of a matrix whose element (i, j) is element
        ``i * width + j`` of the stream; uniform as `uniform`.

        Args:
            rows: int64, (k,), on the device where the values are wanted.

        Returns:
            fp32, (k, stop - start).
        """
        columns = torch.arange(start, stop, dtype=torch.int64, device=rows.device)
        return self.uniform_at(rows.unsqueeze(1) * width + columns)

    def normal(self, start: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Elements ``[start, start + count)`` of N(0, 1), fp32: Box-Muller on the word's halves."""
        out = torch.empty(count, dtype=torch.float32, device=device)
        for at in range(0, count, _CHUNK):
            part = out[at : at + _CHUNK]
            words = self.words(start + at, part.numel(), device)
            # 32 bits each, offset by a half so that the logarithm never sees zero
            radius = (_shift_right(words, 32).double() + 0.5).mul_(2.0**-32).log_().mul_(-2.0)
            angle = ((words & 0xFFFFFFFF).double() + 0.5).mul_(2.0 * math.pi * 2.0**-32)
            part.copy_(radius.sqrt_().mul_(angle.cos_()))
        return out

    def permutation(self, size: int) -> Permutation:
        """A random permutation of ``range(size)`` that is evaluated index by index."""
        return Permutation(self, size)


@dataclass(frozen=True)
class Permutation:
    """A pseudorandom bijection on ``range(size)`` in O(1) memory.

    A balanced Feistel network over the next even number of bits; values that fall outside the range
    walk along their cycle until they come back in (Black and Rogaway, CT-RSA 2002).
    """

    stream: Stream
    size: int

    _ROUNDS = 8

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Images of `index` (any shape, values in [0, size)), int64 of the same shape.

        Raises:
            IndexError: an index is outside the range.
        """
        index = np.asarray(index, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.size):
            raise IndexError(f"index outside of a permutation of {self.size} elements")
        half = max(1, (max(self.size - 1, 1).bit_length() + 1) // 2)
        value = self._network(index.astype(np.uint64).reshape(-1), half)
        outside = value >= self.size
        while outside.any():
            value[outside] = self._network(value[outside], half)
            outside = value >= self.size
        return value.astype(np.int64).reshape(index.shape)

    def _network(self, value: np.ndarray, half: int) -> np.ndarray:
        first, second = self.stream.key
        mask = np.uint64((1 << half) - 1)
        left, right = value >> np.uint64(half), value & mask
        with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
            for number in range(self._ROUNDS):
                key = np.uint64((first + number * second) & _MASK64)
                word = right * np.uint64(_GOLDEN) + key
                word = (word ^ (word >> np.uint64(30))) * np.uint64(_MIX_1)
                word = (word ^ (word >> np.uint64(27))) * np.uint64(_MIX_2)
                left, right = right, left ^ ((word ^ (word >> np.uint64(31))) & mask)
        return (left << np.uint64(half)) | right
