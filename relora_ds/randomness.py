"""Counter-based randomness: a draw is a pure function of what it is for.

Every draw depends on (run seed, purpose, full parameter name, event number, element index) and on
nothing else: not on a global generator, the process rank, the ZeRO stage, the device or the order
of calls. Any slice of a tensor can be drawn on its own, which is what a rank that owns a partition
needs, and a resumed run needs no generator state.

The generator is a keyed hash: the 128-bit key is BLAKE2b of the first four coordinates, the element
index is hashed by two rounds of the SplitMix64 finaliser (Steele, Lea and Flood, OOPSLA 2014).

From a word to a number every step is one that IEEE 754 defines exactly, so that processors, GPUs
and the C kernels of `numerics.draws` agree bit for bit. No library's logarithm or cosine is asked.
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
# Coefficients of fdlibm (Sun Microsystems), highest power first
_ROOT_HALF = 0x3FE6A09E00000000  # bits of sqrt(1/2), rounded down
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LOG_EVEN = (1.531383769920937332e-01, 2.222219843214978396e-01, 3.999999999940941908e-01)
_LOG_ODD = (
    1.479819860511658591e-01,
    1.818357216161805012e-01,
    2.857142874366239149e-01,
    6.666666666666735130e-01,
)
_QUARTER_HIGH, _QUARTER_LOW = 1.57079632673412561417e00, 6.07710050650619224932e-11  # of a turn
_COS_LOW = (2.48015872894767294178e-05, -1.38888888888741095749e-03, 4.16666666666666019037e-02)
_COS_HIGH = (-1.13596475577881948265e-11, 2.08757232129817482790e-09, -2.75573143513906633035e-07)
_SIN_LOW = (2.75573137070700676789e-06, -1.98412698298579493134e-04)
_SIN_HIGH = (1.58969099521155010221e-10, -2.50507602534068634195e-08)
_SIN_THIRD, _SIN_FIRST = 8.33333333332248946124e-03, -1.66666666666666324348e-01
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


def _polynomial(x: torch.Tensor, *coefficients: float) -> torch.Tensor:
    """Horner's scheme, highest power first. Products and sums stay apart: fused ones round once."""
    value = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[-1])


def _log(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of positive normal fp64 numbers, to 1 ulp, by the scheme of fdlibm."""
    # x = 2**k (1 + f) with 1 + f between the roots of 1/2 and 2
    bits = x.view(torch.int64) + (0x3FF0000000000000 - _ROOT_HALF)
    k = _shift_right(bits, 52).double().sub_(1023.0)
    f = bits.bitwise_and_((1 << 52) - 1).add_(_ROOT_HALF).view(torch.float64).sub_(1.0)
    half_square = (f * f).mul_(0.5)
    s = f / (f + 2.0)
    z = s * s
    w = z * z
    even = _polynomial(w, *_LOG_EVEN).mul_(w)
    odd = _polynomial(w, *_LOG_ODD).mul_(z)
    tail = even.add_(odd).add_(half_square).mul_(s)
    out = (k * _LN2_LOW).add_(tail).sub_(half_square)
    return out.add_(f).add_(k.mul_(_LN2_HIGH))


def _cosine(turn: torch.Tensor) -> torch.Tensor:
    """cos(2 pi (turn + 1/2) / 2**32) of int64 numbers below 2**32: fp64, to 1 ulp of fdlibm's."""
    quarter = (turn + (1 << 29)) >> 30
    n = quarter.double()
    y = turn.double().add_(0.5).mul_(2.0 * math.pi * 2.0**-32)
    y.sub_(n * _QUARTER_HIGH).sub_(n * _QUARTER_LOW)
    z = y * y
    w = z * z
    half = z * 0.5
    rest = 1.0 - half
    high = _polynomial(z, *_COS_HIGH).mul_(w.square())
    cosine = _polynomial(z, *_COS_LOW).mul_(z).add_(high).mul_(z)
    cosine = (1.0 - rest).sub_(half).add_(cosine).add_(rest)
    high = _polynomial(z, *_SIN_HIGH).mul_(z * w)
    sine = _polynomial(z, *_SIN_LOW).mul_(z).add_(high).add_(_SIN_THIRD)
    sine = sine.mul_(z).add_(_SIN_FIRST).mul_(z.mul_(y)).add_(y)
    value = torch.where((quarter & 1).bool(), sine, cosine)
    return torch.where((quarter + 1 & 2).bool(), -value, value)


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
            radius = _log((_shift_right(words, 32).double() + 0.5).mul_(2.0**-32)).mul_(-2.0)
            part.copy_(radius.sqrt_().mul_(_cosine(words & 0xFFFFFFFF)))
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
