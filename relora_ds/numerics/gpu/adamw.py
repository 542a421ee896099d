"""AdamW over a whole flat tensor in one launch: an age per vector, 8-bit moments, random rounding.

Every step is one that IEEE 754 defines exactly and none is fused, so that the results are those of
`optim/vector_block.c`, `block_codes.c` and `rounding.c`, bit for bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from relora_ds.numerics.codes.block_codes import code_tables
from relora_ds.numerics.gpu import launch
from relora_ds.numerics.gpu.hashing import words
from relora_ds.randomness import Stream

_BLOCKS = 2  # of codes, for a program
_VECTORS = 256


@triton.jit
def vector_factors(
    times,  # (2, count) int32: births and thaws
    rates,  # fp64: learning rate, eps / learning rate, decay of the weights
    corrections,  # (2, ages) fp64: c1 / sqrt(c2), and c1
    factors,  # (4, count) fp32, written: live, decay, slope, shift
    count,
    ages,
    step,
    block: tl.constexpr,
):
    vector = tl.program_id(0) * block + tl.arange(0, block)
    inside = vector < count
    age = step - tl.load(times + vector, mask=inside, other=0)
    live = tl.load(times + count + vector, mask=inside, other=0) < step
    slope = tl.load(corrections + age, mask=inside, other=1.0) / tl.load(rates)
    shift = tl.load(corrections + ages + age, mask=inside, other=1.0) * tl.load(rates + 1)
    decay = tl.where(live, tl.load(rates + 2), 1.0)
    # whatever the moment, no update
    shift = tl.where(live, shift, float("inf"))
    tl.store(factors + vector, live.to(tl.float32), mask=inside)
    tl.store(factors + count + vector, decay.to(tl.float32), mask=inside)
    tl.store(factors + 2 * count + vector, slope.to(tl.float32), mask=inside)
    tl.store(factors + 3 * count + vector, shift.to(tl.float32), mask=inside)


@triton.jit
def last_before(table, number, place):
    """The last of some stretches, in order and without gaps, that begins at `place` or before."""
    low, high = 0, number
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * 5) <= place
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def vectors_of(table, number, at, first, end):
    """Which vector each element belongs to: int32, of the shape of `at`."""
    vector = tl.full(at.shape, 0, tl.int32)
    for each in range(last_before(table, number, first), last_before(table, number, end - 1) + 1):
        row = table + each * 5
        start, stop = tl.load(row), tl.load(row + 1)
        cols, axis = tl.load(row + 2).to(tl.int32), tl.load(row + 3)
        within = (at - start).to(tl.int32)
        down = within // cols
        along = tl.where(axis == 1, within - down * cols, tl.where(axis == 0, down, 0))
        here = (at >= start) & (at < stop)
        vector = tl.where(here, tl.load(row + 4).to(tl.int32) + along, vector)
    return vector


@triton.jit
def read(moment, scales, levels, at, inside, number, exists, coded: tl.constexpr):
    """Values of blocks of a moment, (blocks, 256), fp32."""
    if coded:
        code = tl.load(moment + at, mask=inside, other=0).to(tl.uint8, bitcast=True)
        scale = tl.load(scales + number, mask=exists, other=0.0)
        values = tl.load(levels + code.to(tl.int32)) * scale[:, None]
    else:
        values = tl.load(moment + at, mask=inside, other=0.0)
    return values


@triton.jit
def encode(values, codes, scales, borders, nearby, at, inside, number, exists):
    """Write values (blocks, 256) as codes; those that are not `inside` are zero."""
    most = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    tl.store(scales + number, most.to(tl.float32, bitcast=True), mask=exists)
    # floats without a sign are in the order of their bits; the smallest normal one
    divisor = tl.where(most < 0x00800000, 0x00800000, most).to(tl.float32, bitcast=True)
    share = tl.div_rn(tl.abs(values), tl.broadcast_to(divisor[:, None], values.shape))
    bits = share.to(tl.int32, bitcast=True)
    begins = bits >> 16
    code = tl.load(nearby + tl.where(begins < 0x3F80, begins, 0x3F80)).to(tl.int32)
    border = tl.load(borders + code).to(tl.int32, bitcast=True)
    found = code + (border < bits).to(tl.int32)
    if codes.dtype.element_ty == tl.int8:
        found = tl.where(values < 0.0, -found, found)
    else:
        found = tl.where((found == 0) & (values > 0.0), 1, found)
    tl.store(codes + at, found.to(codes.dtype.element_ty), mask=inside)


@triton.jit
def rounded_at_random(values, first, first_key, second_key):
    """The bits of bf16 of values (blocks, 256) in fp32; draws are the stream's from `first` on."""
    quarters: tl.constexpr = values.shape[0] * values.shape[1] // 4
    drawn = words(first // 4 + tl.arange(0, quarters), first_key, second_key)
    shorts = drawn[:, None] >> (16 * tl.arange(0, 4))[None, :].to(tl.uint64)
    draw = tl.reshape((shorts & 0xFFFF).to(tl.int32), values.shape)
    bits = values.to(tl.int32, bitcast=True)
    # nothing is above the largest bf16: what is larger stays below infinity
    return (bits + tl.where((bits & 0x7FFFFFFF) < 0x7F7F0000, draw, 0)) >> 16


@triton.jit
def advance(
    p,
    grad,
    first,  # moments or their codes
    second,
    first_scales,
    second_scales,
    tables,  # fp32: levels of both moments' codes, then borders, 256 each
    nearby,  # uint8: first codes of both, 0x3F81 each
    scale,  # fp32: factor of the gradient
    rectangles,  # (number, 5): first element, end, columns, axis, first vector
    number,
    factors,
    count,  # of vectors
    length,
    take1,
    beta2,
    take2,
    first_key,
    second_key,
    coded: tl.constexpr,
    rounded: tl.constexpr,
    blocks: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * (blocks * 256)
    at = begin + tl.arange(0, blocks)[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = at < length
    block = begin // 256 + tl.arange(0, blocks)
    exists = block * 256 < length
    end = tl.minimum(begin + blocks * 256, length)
    own = factors + vectors_of(rectangles, number, at, begin, end)
    live = tl.load(own, mask=inside, other=0.0)
    decay = tl.load(own + count, mask=inside, other=1.0)
    slope = tl.load(own + 2 * count, mask=inside, other=1.0)
    shift = tl.load(own + 3 * count, mask=inside, other=1.0)

    value = tl.load(p + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scale) * live
    m = read(first, first_scales, tables, at, inside, block, exists, coded)
    v = read(second, second_scales, tables + 256, at, inside, block, exists, coded)
    if coded:  # of the second moment the root is kept
        v = v * v
    m = tl.where(inside, m + take1 * (x - m), 0.0)
    v = tl.where(inside, v * beta2 + take2 * x * x, 0.0)
    value = value * decay - tl.div_rn(m, tl.sqrt_rn(v) * slope + shift)

    if coded:
        v, other = tl.sqrt_rn(v), nearby + 0x3F81
        encode(m, first, first_scales, tables + 512, nearby, at, inside, block, exists)
        encode(v, second, second_scales, tables + 768, other, at, inside, block, exists)
    else:
        tl.store(first + at, m, mask=inside)
        tl.store(second + at, v, mask=inside)
    if rounded:
        bits = rounded_at_random(value, begin, first_key, second_key)
        tl.store(p + at, bits.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(p + at, value, mask=inside)


@dataclass(frozen=True)
class Ages:
    """Which vector every element belongs to, and how old the vectors are; all on the device."""

    rectangles: torch.Tensor
    """(stretches, 5) int64, in order and without gaps: first element, end, columns, axis, first
    vector. Axis 0: its rows are vectors; 1: its columns are; 2: all of it is one."""
    times: torch.Tensor
    """(2, vectors) int32: births and thaws."""
    corrections: torch.Tensor
    """(2, ages) fp64: for each age c1 / sqrt(c2) and c1, where c = 1 - beta^age."""


@dataclass(frozen=True)
class Moment:
    """One of Adam's moments: fp32, or codes with the fp32 scales of their blocks."""

    values: torch.Tensor
    scales: torch.Tensor | None = None


def update(
    p: torch.Tensor,
    grad: torch.Tensor,
    moments: tuple[Moment, Moment],
    ages: Ages,
    step: int,
    rates: torch.Tensor,
    betas: tuple[float, float],
    scale: torch.Tensor | None,
    stream: Stream | None,
) -> None:
    """One AdamW update of a flat tensor and its moments, in place.

    Args:
        p: 1-D, fp32, or bf16, which is rounded at random.
        grad: of its shape, fp32 or bf16.
        moments: both in fp32 or both in codes.
        ages: of its vectors.
        step: number of the update.
        rates: fp64 (3,) on the device: learning rate, eps divided by it, decay of the weights;
            where the learning rate is 0, 1 and infinity instead of the first two.
        betas: decay rates of the moments.
        scale: fp32 scalar that the gradient is multiplied by.
        stream: draws of the rounding.
    """
    count, device = ages.times.shape[1], p.device
    factors = torch.empty(4, count, device=device)
    launch.start(
        vector_factors,
        (-(-count // _VECTORS),),
        *(ages.times, rates, ages.corrections, factors),
        *(count, ages.corrections.shape[1], step, _VECTORS),
    )
    coded = moments[0].scales is not None
    tables, nearby = _tables_on(device) if coded else (factors, factors)
    scales = [factors if each.scales is None else each.scales for each in moments]
    keys = (0, 0) if stream is None else tuple(_signed(key) for key in stream.key)
    launch.start(
        advance,
        (-(-p.numel() // (256 * _BLOCKS)),),
        *(p, grad, *(each.values for each in moments), *scales, tables, nearby),
        _one(device) if scale is None else scale,
        *(ages.rectangles, len(ages.rectangles), factors, count, p.numel()),
        *(1.0 - betas[0], betas[1], 1.0 - betas[1], *keys),
        *(coded, stream is not None, _BLOCKS),
    )


@functools.cache
def _tables_on(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels of the codes of both moments and their borders, (1024,), and the first codes."""
    first, second = (code_tables(kind, device) for kind in (torch.int8, torch.uint8))
    missing = torch.full((256 - len(first.borders),), torch.inf, device=device)
    tables = torch.cat([first.levels, second.levels, first.borders, missing, second.borders])
    return tables, torch.cat([first.nearby, second.nearby]).to(device)


@functools.cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones((), device=device)


def _signed(key: int) -> int:
    return key - (1 << 64) if key >= 1 << 63 else key
