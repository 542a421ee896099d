"""Rows of uniform draws, of many matrices at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from relora_ds.numerics.gpu import launch
from relora_ds.numerics.transfers import orderless_writes
from relora_ds.randomness import Stream


@dataclass(frozen=True)
class UniformRows:
    """A matrix of draws that is never held: element (i, j) is number i * width + j of a stream."""

    stream: Stream
    width: int
    start: int
    """First column that is wanted."""
    stop: int
    """End of the columns that are wanted."""
    bound: float
    """Draws are uniform on [-bound, bound)."""

    def __call__(self, numbers: torch.Tensor) -> torch.Tensor:
        """Some rows, fp32 (k, stop - start), on the device of their numbers, int64 (k,)."""
        drawn = self.stream.uniform_rows(numbers, self.width, self.start, self.stop)
        return drawn.mul_(2.0).sub_(1.0).mul_(self.bound)


@dataclass(frozen=True)
class RowDraw:
    """Rows to be drawn, and where they go."""

    rows: UniformRows
    target: torch.Tensor
    """(places, columns), contiguous rows."""
    which: torch.Tensor
    """int64 (2, k): places in the target, and numbers of the rows. On the CPU where kernels are
    `launch.usable` on the target's device, beside the target elsewhere."""


def draw_rows(draws: Sequence[RowDraw], device: torch.device) -> None:
    """Draw rows into their places, rounded to nearest. The host does not wait.

    Args:
        draws: targets of one type, on the device.
        device: where they are.
    """
    if not draws:
        return
    if launch.usable(device):
        from relora_ds.numerics.gpu import draws as gpu  # needs Triton

        return gpu.draw_rows(draws)
    with orderless_writes():
        for draw in draws:
            places, numbers = draw.which
            draw.target[places] = draw.rows(numbers).to(draw.target.dtype)
