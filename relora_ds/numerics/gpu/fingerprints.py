"""64 bits of the content of many tensors: one launch for all elements of a width, one pass.

All sums are modulo 2^64, so that their order makes no difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from relora_ds.numerics.batched.fingerprints import WIDTH
from relora_ds.numerics.gpu import launch
from relora_ds.numerics.gpu.types import TYPES

_BLOCK, _PROGRAMS = 1024, 256  # programs that share a tensor


@triton.jit
def weight_of(number):
    """Of a word, a column or a row, by its number; int64."""
    return number * -7046029254386353131 | 1


@triton.jit
def add_up(
    table,  # (tensors, 4): address, elements, elements of whole rows, place of the sum
    sums,  # int64, zero before
    kind: tl.constexpr,
    per_word: tl.constexpr,  # elements of a word of 64 bits
    width: tl.constexpr,  # words of a row
    block: tl.constexpr,
):
    job = table + tl.program_id(0) * 4
    elements = tl.load(job).to(tl.pointer_type(kind))
    count, body = tl.load(job + 1), tl.load(job + 2)
    first = tl.program_id(1).to(tl.int64) * block
    if first >= count:
        return
    total = tl.full([block], 0, tl.int64)
    for start in range(first, count, tl.num_programs(1).to(tl.int64) * block):
        at = (start + tl.arange(0, block)).to(tl.int64)
        value = tl.load(elements + at, mask=at < count, other=0).to(tl.int64)
        word = at // per_word
        place = weight_of(word % width) * 17 + weight_of(word // width)
        part = value if per_word == 1 else value & ((1 << (64 // per_word)) - 1)
        whole = (part << (at % per_word * (64 // per_word))) * place
        beyond = value * weight_of(at - body) * tl.where(body > 0, 31, 1)
        total += tl.where(at < body, whole, beyond)
    tl.atomic_add(sums + tl.load(job + 3), tl.sum(total), sem="relaxed")


def fingerprints(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Fingerprints (tensors,) of integer tensors of one device, 1-D and contiguous."""
    sums = torch.zeros(len(tensors), dtype=torch.int64, device=tensors[0].device)
    jobs: dict[torch.dtype, list[tuple[int, ...]]] = {}
    for place, words in enumerate(tensors):
        row, count = WIDTH * (8 // words.element_size()), words.numel()
        job = words.data_ptr(), count, count // row * row, place
        jobs.setdefault(words.dtype, []).append(job)
    tables = [np.array(each, dtype=np.int64) for each in jobs.values()]
    sent = launch.send_tables(tables, sums.device)
    for kind, table, there in zip(jobs, tables, sent, strict=True):
        programs = min(_PROGRAMS, -(-int(table[:, 1].max()) // _BLOCK))
        sizes = 8 // kind.itemsize, WIDTH, _BLOCK
        launch.start(add_up, (len(table), programs), there, sums, TYPES[kind], *sizes)
    return sums
