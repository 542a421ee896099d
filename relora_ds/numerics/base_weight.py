"""Frozen weights that a method edits, and how exactly an edit is kept.

A bf16 weight rounds away what is below half a unit in its last place, which loses up to half of a
merge. The authoritative value is therefore kept to fp32 precision beside the working weight, and
only the working weight takes part in matrix products and communication.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from relora_ds.randomness import Stream

_SAMPLED = 32  # rows that a report looks at
# Elements edited at once, which bounds the temporaries: on a CPU they stay in its cache, and are
# not fresh pages each time; on other devices every block is a few launches.
_BLOCKS = {"cpu": 1 << 16}
_LARGE_BLOCK = 1 << 22
_PROBES = 4

Precision = Literal["working", "bf16_residual", "fp32"]


@dataclass(frozen=True)
class WeightEdit:
    """How an edit of a frozen weight came out, over the elements that this rank edited."""

    elements: int
    """Elements whose authoritative value changed."""
    error_sq: float
    """Squared norm of (intended - stored) @ x on probe inputs x, in float64."""
    output_sq: float
    """Squared norm of the edited weight @ x on the same inputs."""
    intended_sq: float
    """Squared Frobenius norm of the intended change."""
    lost_sq: float
    """Squared Frobenius norm of the part of it that the stored weight did not take up."""

    @classmethod
    def of(cls, sums: Sequence[float]) -> WeightEdit:
        """From the figures of `add_product`, read from the device."""
        elements, error_sq, output_sq, intended_sq, lost_sq = sums
        return cls(int(elements), error_sq, output_sq, intended_sq, lost_sq)


class BaseWeight(ABC):
    """The authoritative value of one frozen weight.

    Args:
        working: the weight that the model computes with, a live 1-D view; it is overwritten with
            `exact` as this store rounds it.
        exact: the value before any rounding, fp32, 1-D.
    """

    @abstractmethod
    def __init__(self, working: torch.Tensor, exact: torch.Tensor) -> None: ...

    def load(self, working: torch.Tensor, start: int) -> torch.Tensor:
        """A copy of the authoritative fp32 values behind `working`, a 1-D slice from `start` on."""
        end = start + working.numel()
        return self.joined(working, *(kept[start:end] for kept in self.tensors().values()))

    def load_rows(self, working: torch.Tensor, start: int, cols: int, step: int) -> torch.Tensor:
        """Authoritative values of every `step`-th row, (rows, cols), as one operation.

        Args:
            working: whole rows of `cols` elements, a 1-D slice that begins at `start`.
        """
        end = start + working.numel()
        beside = (kept[start:end] for kept in self.tensors().values())
        return self.joined(*(part.view(-1, cols)[::step] for part in (working, *beside)))

    @abstractmethod
    def joined(self, working: torch.Tensor, *beside: torch.Tensor) -> torch.Tensor:
        """Authoritative fp32 values, as a copy, of working values and of what is kept beside them.

        Args:
            working: of any shape.
            beside: the same elements of `tensors`, in their order.
        """

    @abstractmethod
    def store(self, working: torch.Tensor, start: int, exact: torch.Tensor) -> None:
        """Set both the working slice and whatever is kept beside it."""

    def add(self, working: torch.Tensor, start: int, delta: torch.Tensor) -> None:
        """Add fp32 `delta` to the authoritative values of a slice."""
        self.store(working, start, self.load(working, start).add_(delta))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold beyond the working weight, as live tensors."""
        return {}


class Working(BaseWeight):
    """The working weight is all there is: exact in fp32, lossy in bf16."""

    def __init__(self, working: torch.Tensor, exact: torch.Tensor) -> None:
        working.copy_(exact)

    def joined(self, working: torch.Tensor, *beside: torch.Tensor) -> torch.Tensor:
        return working.to(torch.float32, copy=True)

    def store(self, working: torch.Tensor, start: int, exact: torch.Tensor) -> None:
        working.copy_(exact)

    def add(self, working: torch.Tensor, start: int, delta: torch.Tensor) -> None:
        working.add_(delta)  # computed in fp32 and rounded once, whatever the working precision


class Residual(BaseWeight):
    """bf16 working weight plus an int16 that restores the fp32 word bit for bit.

    The upper half is rounded to nearest with ties away from zero, so the rest always fits 16 bits;
    ties to even, as `Tensor.bfloat16` rounds, would overflow on one side.
    """

    def __init__(self, working: torch.Tensor, exact: torch.Tensor) -> None:
        self.low = torch.empty(exact.numel(), dtype=torch.int16, device=exact.device)
        self.store(working, 0, exact)

    def joined(self, working: torch.Tensor, *beside: torch.Tensor) -> torch.Tensor:
        (low,) = beside
        upper = working.view(torch.int16).to(torch.int32) << 16
        return (upper + low.to(torch.int32)).view(torch.float32)

    def store(self, working: torch.Tensor, start: int, exact: torch.Tensor) -> None:
        bits = exact.contiguous().view(torch.int32)
        upper = (bits + 0x8000) >> 16
        working.view(torch.int16).copy_(upper)
        self.low[start : start + working.numel()].copy_(bits - (upper << 16))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"low": self.low}


class FullPrecision(BaseWeight):
    """An fp32 copy beside the working weight."""

    def __init__(self, working: torch.Tensor, exact: torch.Tensor) -> None:
        self.exact = exact.clone()
        working.copy_(exact)

    def joined(self, working: torch.Tensor, *beside: torch.Tensor) -> torch.Tensor:
        return beside[0].clone()

    def store(self, working: torch.Tensor, start: int, exact: torch.Tensor) -> None:
        self.exact[start : start + working.numel()].copy_(exact)
        working.copy_(exact)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"exact": self.exact}


KINDS: dict[Precision, type[BaseWeight]] = {
    "working": Working,
    "bf16_residual": Residual,
    "fp32": FullPrecision,
}


class ProductReport:
    """How weight += scale * left (rows, k) @ right (k, cols) comes out for a slice of the weight.

    A sample of rows is compared with float64, the outputs on a few fixed +-1 inputs, so that it
    measures the rounding of the edit and nothing else and costs little beside it. A row of which
    this slice holds a part counts in it as a row of its own.

    Args:
        base: store of the slice, before the edit.
        working: elements [start, start + n) of the flattened working weight, a live view.
        start: of the slice.
        left: whole; only the rows that the slice touches are read.
        right: whole.
        scale: a number, or a scalar on the weight's device.
    """

    def __init__(
        self,
        base: BaseWeight,
        working: torch.Tensor,
        start: int,
        left: torch.Tensor,
        right: torch.Tensor,
        scale: float | torch.Tensor,
    ) -> None:
        self._sample = _Sample(base, working, start, left.shape[0], right.shape[1])
        self._old = self._sample.read()
        self._left, self._right, self._scale = left, right, scale

    def sums(self) -> torch.Tensor:
        """The fields of a `WeightEdit` in their order after the edit, float64, on the weight's
        device: nothing is waited for."""
        new, right = self._sample.read(), self._right
        meant = self._scale * (self._sample.of(self._left).double() @ right.double())
        meant *= self._sample.mask
        lost = (new - self._old).sub_(meant)
        probes = _probe_inputs(right.shape[1], new.device)
        parts = (lost @ probes, new @ probes, meant, lost)
        elements = (new != self._old).sum().double()
        return torch.stack([elements, *(part.square().sum() for part in parts)])


def add_product(
    base: BaseWeight,
    working: torch.Tensor,
    start: int,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float | torch.Tensor,
) -> torch.Tensor:
    """weight += scale * left (rows, k) @ right (k, cols), for a slice of the flattened weight.

    Products are formed in fp32.

    Args:
        base: store of the slice.
        working: elements [start, start + n) of the flattened working weight, a live view.
        left: whole; only the rows that the slice touches are read.
        right: whole.
        scale: a number, or a scalar on the weight's device.

    Returns:
        What `ProductReport.sums` found.
    """
    report = ProductReport(base, working, start, left, right, scale)
    apply_product(base, working, start, left, right, scale)
    return report.sums()


def apply_product(
    base: BaseWeight,
    working: torch.Tensor,
    start: int,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float | torch.Tensor,
) -> None:
    """The edit of `add_product` without its report: one pass over the slice, nothing waited for."""
    rows, cols = left.shape[0], right.shape[1]
    left32, right32 = left.float() * scale, right.float()
    step, end = _block_rows(cols, working.device), start + working.numel()
    # Blocks lie on a grid of the whole weight, not of the slice: the last bit of a product depends
    # on the shape of the multiplication, and must not depend on how the weight is cut.
    for top in range(start // cols // step * step, -(-end // cols), step):
        product = (left32[top : top + step] @ right32).view(-1)
        first, last = max(start, top * cols), min(end, (top + step) * cols, rows * cols)
        delta = product[first - top * cols : last - top * cols]
        base.add(working[first - start : last - start], first - start, delta)


def weight_times(
    base: BaseWeight, working: torch.Tensor, start: int, rows: int, right: torch.Tensor
) -> torch.Tensor:
    """weight (rows, n) @ right (n, k) by a slice of the weight, as if all other elements were zero.

    Returns:
        (rows, k), fp32.
    """
    cols, at = right.shape[0], 0
    block = _block_rows(cols, working.device)
    out = torch.zeros(rows, right.shape[1], dtype=torch.float32, device=working.device)
    while at < working.numel():
        # the tail of a row, blocks of whole rows, the head of a row
        row, col = divmod(start + at, cols)
        whole = min(block, (working.numel() - at) // cols)
        height, width = 1 if col else max(1, whole), min(cols - col, working.numel() - at)
        exact = base.load(working[at : at + height * width], at).view(height, width)
        out[row : row + height].addmm_(exact, right[col : col + width])
        at += height * width
    return out


def _block_rows(cols: int, device: torch.device) -> int:
    return max(1, _BLOCKS.get(device.type, _LARGE_BLOCK) // cols)


class _Sample:
    """Up to `_SAMPLED` rows, spread evenly over the whole weight, of which a slice has parts."""

    def __init__(
        self, base: BaseWeight, working: torch.Tensor, start: int, rows: int, cols: int
    ) -> None:
        self._base, self._working, self._start, self._cols = base, working, start, cols
        stride, end = -(-rows // _SAMPLED), start + working.numel()
        first, behind = -(-(start // cols) // stride) * stride, -(-end // cols)
        self.rows = range(first, behind if working.numel() else first, stride)
        self._ranges = [(max(start, row * cols), min(end, row * cols + cols)) for row in self.rows]
        # only the first and the last row that a slice touches can be incomplete
        complete = [n for n, (first, last) in enumerate(self._ranges) if last - first == cols]
        self._complete = slice(complete[0], complete[-1] + 1) if complete else slice(0, 0)
        self.mask = torch.ones(len(self.rows), cols, dtype=torch.float64, device=working.device)
        """1 where the slice has the element."""
        for number, row in self._incomplete():
            first, last = (at - row * cols for at in self._ranges[number])
            self.mask[number, :first] = 0.0
            self.mask[number, last:] = 0.0

    def _incomplete(self) -> list[tuple[int, int]]:
        """Places in the sample, and rows, of which the slice has a part."""
        whole = range(len(self.rows))[self._complete]
        return [(number, row) for number, row in enumerate(self.rows) if number not in whole]

    def of(self, left: torch.Tensor) -> torch.Tensor:
        """The sampled rows of a matrix with as many rows as the weight."""
        return left[self.rows.start : self.rows.stop : self.rows.step][: len(self.rows)]

    def read(self) -> torch.Tensor:
        """Authoritative values (sampled rows, cols), float64, zero where the slice has none."""
        values = torch.zeros_like(self.mask)
        ranges = self._ranges[self._complete]
        if ranges:
            part, at = self._part(ranges[0][0], ranges[-1][1])
            step = self.rows.step
            values[self._complete] = self._base.load_rows(part, at, self._cols, step).double()
        for number, row in self._incomplete():
            first, last = self._ranges[number]
            part, at = self._part(first, last)
            columns = slice(first - row * self._cols, last - row * self._cols)
            values[number, columns] = self._base.load(part, at).double()
        return values

    def _part(self, first: int, last: int) -> tuple[torch.Tensor, int]:
        """A range of the flattened weight as a slice of this slice, and where it begins in it."""
        at = first - self._start
        return self._working[at : at + last - first], at


@functools.lru_cache(maxsize=8)
def _probe_inputs(cols: int, device: torch.device) -> torch.Tensor:
    """(cols, _PROBES) of +-1, fixed and unrelated to any weight."""
    bits = Stream(0, "probe").words(0, cols * _PROBES, device) & 1
    return bits.double().mul_(2.0).sub_(1.0).view(cols, _PROBES)


def store_whole(weight: nn.Parameter, kind: type[BaseWeight], dtype: torch.dtype) -> BaseWeight:
    """Cast a weight and keep its authoritative value, before anything else casts the model.

    Weight by weight, so that no more than one of them is there twice.
    """
    exact = weight.data.view(-1)
    if weight.dtype != dtype:
        weight.data = torch.empty_like(weight.data, dtype=dtype)
    return kind(weight.data.view(-1), exact)
