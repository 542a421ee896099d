"""Rows of uniform draws into their places, for all matrices in one launch; the bits of `Stream`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import triton
import triton.language as tl

from relora_ds.numerics.gpu import launch
from relora_ds.numerics.gpu.hashing import words
from relora_ds.numerics.gpu.types import TYPES, converted

if TYPE_CHECKING:
    from relora_ds.numerics.batched.draws import RowDraw

_BLOCK = 512


@triton.jit
def draw_row(
    table,  # (jobs, 6): target, length, first index, both keys, bits of the bound in fp32
    target_type: tl.constexpr,
    block: tl.constexpr,
):
    job = table + tl.program_id(0).to(tl.int64) * 6
    target = tl.load(job).to(tl.pointer_type(target_type))
    at = tl.program_id(1).to(tl.int64) * block + tl.arange(0, block)
    drawn = words(tl.load(job + 2) + at, tl.load(job + 3), tl.load(job + 4))
    bound = tl.load(job + 5).to(tl.int32).to(tl.float32, bitcast=True)
    uniform = (drawn >> 40).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    value = (uniform * 2.0 - 1.0) * bound
    tl.store(target + at, converted(value, target_type), mask=at < tl.load(job + 1))


def draw_rows(draws: Sequence[RowDraw]) -> None:
    """Draw rows into targets of one type and device."""
    jobs = []
    for draw in draws:
        rows, target = draw.rows, draw.target
        places, numbers = draw.which.numpy()
        assert target.stride(1) == 1
        keys = np.array(rows.stream.key, dtype=np.uint64).view(np.int64)
        columns = (
            target.data_ptr() + places * (target.stride(0) * target.element_size()),
            rows.stop - rows.start,
            numbers * rows.width + rows.start,
            *keys,
            int(np.float32(rows.bound).view(np.int32)),
        )
        jobs.append(np.stack(np.broadcast_arrays(*columns), axis=1))
    table = np.concatenate(jobs)
    (sent,) = launch.send_tables([table], draws[0].target.device)
    grid = len(table), -(-int(table[:, 1].max(initial=0)) // _BLOCK)
    launch.start(draw_row, grid, sent, TYPES[draws[0].target.dtype], _BLOCK)
