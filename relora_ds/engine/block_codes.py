"""Eight-bit codes for Adam's moments, with one scale per block of 256 elements.

Codes are dynamic: their levels are dense near the largest magnitude of a block and reach seven
decades down (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022). Zero is
code 0, exactly, so that an element can be reset by writing a 0, whatever shares its block.

The second moment is stored as its root, which doubles the decades it spans, and a positive value
never becomes zero: a first moment without a second one would be divided by eps alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

BLOCK = 256


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
        levels, _ = _tables(self.codes.dtype, self.codes.device)
        signed = self.codes.to(torch.int32)
        values = levels[signed.abs()].mul_(signed.sign())
        return values.mul_(self._spread(self.scales))

    def store(self, values: torch.Tensor) -> None:
        """Encode values, fp32, 1-D, in place of what was there."""
        _, borders = _tables(self.codes.dtype, self.codes.device)
        size = values.abs()
        blocks = torch.nn.functional.pad(size, (0, -size.numel() % BLOCK)).view(-1, BLOCK)
        self.scales.copy_(blocks.amax(1))
        share = size / self._spread(self.scales.clamp_min(torch.finfo(torch.float32).tiny))
        index = torch.bucketize(share, borders)
        if self.codes.dtype == torch.uint8:
            index = torch.where(values > 0, index.clamp_min(1), index)
        else:
            index.mul_(values.sign().to(index.dtype))
        self.codes.copy_(index)

    def _spread(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.repeat_interleave(BLOCK)[: self.codes.numel()]


@cache
def _tables(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Magnitudes of codes 0, 1, ..., and the borders between neighbouring ones."""
    decades = 7 if dtype == torch.int8 else 8
    levels = [torch.zeros(1, dtype=torch.float64)]
    for decade in range(decades):
        ends = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float64)
        levels.append((ends[1:] + ends[:-1]) / 2 * 10.0 ** (decade - decades + 1))
    table = torch.cat(levels)
    table[-1] = 1.0  # the largest element of a block is kept as it is
    borders = (table[1:] + table[:-1]) / 2
    return table.float().to(device), borders.float().to(device)
