"""The edit of frozen weights by exchanged vectors, for all weights of a model in one launch.

One pass: the fp32 word of an element is put together, edited and taken apart again in registers.
An element's sum runs over the vectors in their order, whatever tile it lies in, so that it is the
same to the last bit however the weight is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl

from relora_ds.numerics.base_weight import BaseWeight, FullPrecision, Residual
from relora_ds.numerics.gpu import launch
from relora_ds.numerics.gpu.types import TYPES, converted

if TYPE_CHECKING:
    from relora_ds.numerics.batched.exchange import Exchange

_ROWS, _COLS, _VECTORS = 32, 64, 16
_WORKING, _RESIDUAL, _FULL = 0, 1, 2


@triton.jit
def product(
    job,  # of the table of `absorb_exchange`
    row,  # (rows, 1) of the weight
    col,  # (1, columns)
    scale,
    vector_type: tl.constexpr,
    vectors: tl.constexpr,
):
    """What a tile of a weight, (rows, columns), is to take up; fp32."""
    height, width, half = tl.load(job + 4), tl.load(job + 5), tl.load(job + 6)
    old_a = tl.load(job + 7).to(tl.pointer_type(vector_type))
    old_b = tl.load(job + 8).to(tl.pointer_type(vector_type))
    new_a = tl.load(job + 9).to(tl.pointer_type(vector_type))
    new_b = tl.load(job + 10).to(tl.pointer_type(vector_type))
    high, wide = row < height, col < width
    change = tl.full([row.shape[0], col.shape[1]], 0.0, tl.float32)
    for first in range(0, 2 * half, vectors):
        i, j = (first + tl.arange(0, vectors))[None, :], (first + tl.arange(0, vectors))[:, None]
        left = tl.load(old_b + i * height + row, mask=high & (i < 2 * half), other=0.0)
        replaced = high & (i >= half) & (i < 2 * half)
        less = tl.load(new_b + (i - half) * height + row, mask=replaced, other=0.0)
        left = (left.to(tl.float32) - less.to(tl.float32)) * scale
        right = tl.load(old_a + j * width + col, mask=wide & (j < 2 * half), other=0.0)
        less = tl.load(new_a + j * width + col, mask=wide & (j < half), other=0.0)
        right = right.to(tl.float32) - less.to(tl.float32)
        change = tl.dot(left, right, change, input_precision="ieee")
    return change


@triton.jit
def absorb_exchange(
    # (weights, 11): working, beside, first element, elements, rows, columns, k, a, b, new a, new b
    table,
    scale,
    store: tl.constexpr,  # 0: the working weight alone, 1: with a residual, 2: with an fp32 copy
    working_type: tl.constexpr,
    vector_type: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
    vectors: tl.constexpr,
):
    job = table + tl.program_id(1).to(tl.int64) * 11
    start, count, width = tl.load(job + 2), tl.load(job + 3), tl.load(job + 5)
    across = (width + cols - 1) // cols
    tile = tl.program_id(0).to(tl.int64)
    top = start // width + tile // across * rows
    if top * width >= start + count:
        return
    row = (top + tl.arange(0, rows))[:, None]
    col = (tile % across * cols + tl.arange(0, cols))[None, :]
    place = row * width + col - start
    inside = (col < width) & (place >= 0) & (place < count)
    change = product(job, row, col, scale, vector_type, vectors)

    working = tl.load(job).to(tl.pointer_type(working_type)) + place
    if store == 1:
        halves = tl.load(job).to(tl.pointer_type(tl.int16)) + place
        lower = tl.load(job + 1).to(tl.pointer_type(tl.int16)) + place
        upper = tl.load(halves, mask=inside, other=0).to(tl.int32) << 16
        word = upper + tl.load(lower, mask=inside, other=0).to(tl.int32)
        word = (word.to(tl.float32, bitcast=True) + change).to(tl.int32, bitcast=True)
        # to nearest, ties away from zero: the rest always fits 16 bits
        upper = (word + 0x8000) >> 16
        tl.store(halves, upper.to(tl.int16), mask=inside)
        tl.store(lower, (word - (upper << 16)).to(tl.int16), mask=inside)
    elif store == 2:
        exact = tl.load(job + 1).to(tl.pointer_type(tl.float32)) + place
        value = tl.load(exact, mask=inside, other=0.0) + change
        tl.store(exact, value, mask=inside)
        tl.store(working, converted(value, working_type), mask=inside)
    else:
        value = tl.load(working, mask=inside, other=0.0).to(tl.float32) + change
        tl.store(working, converted(value, working_type), mask=inside)


def absorb(edits: Sequence[tuple[BaseWeight, torch.Tensor, int, Exchange]]) -> None:
    """Edit slices of weights: store, working values, first element, exchange of the factors."""
    groups: dict[tuple[int, torch.dtype, torch.dtype, float], list[tuple[int, ...]]] = {}
    for base, working, start, exchange in edits:
        store = {Residual: _RESIDUAL, FullPrecision: _FULL}.get(type(base), _WORKING)
        beside = [kept.data_ptr() for kept in base.tensors().values()]
        kinds = store, working.dtype, exchange.a.dtype, exchange.scale
        groups.setdefault(kinds, []).append(
            (
                working.data_ptr(),
                *(beside or [0]),
                start,
                working.numel(),
                exchange.b.shape[1],
                exchange.a.shape[1],
                len(exchange.new_a),
                *(_address(t) for t in (exchange.a, exchange.b, exchange.new_a, exchange.new_b)),
            )
        )
    tables = [np.array(jobs, dtype=np.int64) for jobs in groups.values()]
    sent = launch.send_tables(tables, edits[0][1].device)
    for (store, working_type, vector_type, scale), jobs, table in zip(
        groups, tables, sent, strict=True
    ):
        starts, counts, widths = jobs[:, 2], jobs[:, 3], jobs[:, 5]
        touched = (starts + counts - 1) // widths - starts // widths + 1
        tiles = (-(-touched // _ROWS)) * (-(-widths // _COLS))
        grid = int(tiles[counts > 0].max(initial=0)), len(jobs)
        sizes = _ROWS, _COLS, _VECTORS
        types = TYPES[working_type], TYPES[vector_type]
        # products may be fused with their sums: the reference forms them in fp32, in any order
        options = {"enable_fp_fusion": True, "num_warps": 8, "num_stages": 1}
        launch.start(absorb_exchange, grid, table, scale, store, *types, *sizes, **options)


def _address(vectors: torch.Tensor) -> int:
    assert vectors.is_contiguous()
    return vectors.data_ptr()
