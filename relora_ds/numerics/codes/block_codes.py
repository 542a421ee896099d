"""Eight-bit codes for Adam's moments, with one scale per block of 256 elements.

Codes are dynamic: their levels are dense near the largest magnitude of a block and reach seven
decades down (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022). Zero is
code 0, exactly, so that an element can be reset by writing a 0, whatever shares its block.

The second moment is stored as its root, which doubles the decades it spans, and a positive value
never becomes zero: a first moment without a second one would be divided by eps alone.

They are our own because torchao's states (0.18) refuse slices that do not begin and end with a
block, where a rank vector and a ZeRO partition rarely do, fall back to 32 bits where a tensor is no
multiple of one, and let small second moments vanish. bitsandbytes (0.50) has one step count per
tensor and no hook between decoding and update where vectors of other ages could be told apart.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from relora_ds.numerics.host.kernels import ieee_roots, in_parts, load_kernels

BLOCK = 256
_SOURCE = Path(__file__).with_suffix(".c")


@dataclass(frozen=True)
class Codes:
    """Codes and scales of a moment.

    Args:
        codes: int8 for signed values, uint8 for non-negative ones; 1-D.
        scales: fp32, one per block of `BLOCK` codes.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def load(self) -> torch.Tensor:
        """The values, fp32, 1-D."""
        tables = code_tables(self.codes.dtype, self.codes.device)
        library = self._kernels()
        if library is not None:
            values = torch.empty(self.codes.shape, dtype=torch.float32)
            self._over_blocks(library.load, values, (tables.levels.data_ptr(),))
            return values
        values = tables.levels[self.codes.view(torch.uint8).to(torch.int32)]
        return values.mul_(self._spread(self.scales))

    def store(self, values: torch.Tensor) -> None:
        """Encode values, fp32, 1-D, in place of what was there."""
        tables, signed = (
            code_tables(self.codes.dtype, self.codes.device),
            self.codes.dtype.is_signed,
        )
        library = self._kernels()
        if library is not None:
            more = tables.borders.data_ptr(), tables.nearby.data_ptr(), int(signed)
            return self._over_blocks(library.store, values, more)
        size = values.abs()
        blocks = torch.nn.functional.pad(size, (0, -size.numel() % BLOCK)).view(-1, BLOCK)
        self.scales.copy_(blocks.amax(1))
        share = size / self._spread(self.scales.clamp_min(torch.finfo(torch.float32).tiny))
        index = torch.bucketize(share, tables.borders[:-1])
        if signed:
            index.mul_(values.sign().to(index.dtype))
        else:
            index = torch.where(values > 0, index.clamp_min(1), index)
        self.codes.copy_(index)

    def _spread(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.repeat_interleave(BLOCK)[: self.codes.numel()]

    def _kernels(self) -> ctypes.CDLL | None:
        library = load_kernels(_SOURCE) if self.codes.device.type == "cpu" else None
        return library if library is None else _typed(library)

    def _over_blocks(
        self, kernel: ctypes._NamedFuncPointer, values: torch.Tensor, more: tuple[int, ...]
    ) -> None:
        """A kernel over all blocks, with what comes after the count in its arguments."""
        assert values.is_contiguous()
        assert values.dtype == torch.float32
        count, starts = self.codes.numel(), (values, self.codes, self.scales)
        addresses = [tensor.data_ptr() for tensor in starts]

        def part(first: int, stop: int) -> None:
            skipped = (4 * BLOCK * first, BLOCK * first, 4 * first)
            own = (at + skip for at, skip in zip(addresses, skipped, strict=True))
            kernel(*own, min(count, BLOCK * stop) - BLOCK * first, *more)

        in_parts(part, -(-count // BLOCK), count)


def take_roots(values: torch.Tensor) -> torch.Tensor:
    """Roots of fp32 values, 1-D and contiguous, in place: as IEEE 754 rounds them on any device."""
    if values.device.type != "cpu":
        return values.sqrt_()
    library = load_kernels(_SOURCE)
    if library is None:
        return ieee_roots(values)
    assert values.is_contiguous()
    kernel, start = _typed(library).roots, values.data_ptr()
    in_parts(
        lambda first, stop: kernel(start + 4 * first, stop - first), values.numel(), values.numel()
    )
    return values


@functools.cache
def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    library.load.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_size_t, ctypes.c_void_p]
    pointers = [ctypes.c_void_p] * 3, [ctypes.c_void_p] * 2
    library.store.argtypes = [*pointers[0], ctypes.c_size_t, *pointers[1], ctypes.c_int]
    library.roots.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.load.restype = library.store.restype = library.roots.restype = None
    return library


class Tables(NamedTuple):
    """What codes of a type stand for."""

    levels: torch.Tensor
    """Value of every code, by its byte: fp32, (256,)."""
    borders: torch.Tensor
    """Between magnitudes of neighbouring codes, and infinity: fp32."""
    nearby: torch.Tensor
    """First code of the shares whose fp32 begins with 16 bits, up to 1: uint8, on the host."""


@functools.cache
def code_tables(dtype: torch.dtype, device: torch.device) -> Tables:
    """Of codes of the first moment, int8, or of the second one, uint8."""
    decades = 7 if dtype == torch.int8 else 8
    levels = [torch.zeros(1, dtype=torch.float64)]
    for decade in range(decades):
        ends = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float64)
        levels.append((ends[1:] + ends[:-1]) / 2 * 10.0 ** (decade - decades + 1))
    table = torch.cat(levels)
    table[-1] = 1.0  # the largest element of a block is kept as it is
    borders = torch.cat([(table[1:] + table[:-1]) / 2, table.new_full((1,), torch.inf)]).float()
    beginnings = (torch.arange(0x3F81, dtype=torch.int32) << 16).view(torch.float32)
    nearby = torch.bucketize(beginnings, borders).to(torch.uint8)
    if dtype == torch.int8:  # code -128 is never written
        table = torch.cat([table, table.new_zeros(1), -table[1:].flip(0)])
    return Tables(table.float().to(device), borders.to(device), nearby)
