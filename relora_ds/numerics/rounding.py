"""Stochastic rounding to bf16: up or down at random, so that the expectation is the fp32 value.

Nearest rounding loses every update below half a unit in the last place, which in bf16 is 1/512 of a
weight. Sixteen random bits, added to the sixteen that bf16 has no room for, carry into the last
place with exactly the right probability; a value that bf16 can hold has none to be added to and
stays as it is.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from relora_ds.numerics.host.kernels import in_parts, load_kernels
from relora_ds.randomness import SHORTS_PER_WORD, Stream

_SOURCE = Path(__file__).with_suffix(".c")
_LARGEST = 0x7F7F0000  # bits of the largest bf16


def round_at_random(values: torch.Tensor, out: torch.Tensor, stream: Stream, start: int) -> None:
    """Round values into `out`. Finite values stay finite; infinities and NaN stay what they are.

    Args:
        values: fp32, 1-D, contiguous. Temporaries take several times its size where there is no
            kernel.
        out: bf16, of the same shape and device.
        stream: where the draws come from; element i takes number `start + i`.
        start: a multiple of four.
    """
    assert start % SHORTS_PER_WORD == 0, "a word is not shared between two calls"
    library = load_kernels(_SOURCE) if values.device.type == "cpu" else None
    if library is not None:
        return _run(_kernel(library), values, out, stream, start)
    bits = values.view(torch.int32)
    draws = stream.shorts(start, values.numel(), values.device)
    # nothing is above the largest bf16: what is larger stays below infinity
    draws.mul_(bits.bitwise_and(0x7FFFFFFF) < _LARGEST)
    out.view(torch.int16).copy_(draws.add_(bits).bitwise_right_shift_(16))


@functools.cache
def _kernel(library: ctypes.CDLL) -> Any:
    kernel = library.round_at_random
    kernel.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] + [ctypes.c_uint64] * 3
    kernel.restype = None
    return kernel


def _run(kernel: Any, values: torch.Tensor, out: torch.Tensor, stream: Stream, start: int) -> None:
    for tensor, kind in ((values, torch.float32), (out, torch.bfloat16)):
        assert tensor.dtype == kind
        assert tensor.is_contiguous()
    keys, source, target = stream.key, values.data_ptr(), out.data_ptr()
    count, word = values.numel(), start // SHORTS_PER_WORD

    def part(first: int, stop: int) -> None:
        at = first * SHORTS_PER_WORD
        length = min(count, stop * SHORTS_PER_WORD) - at
        kernel(source + 4 * at, target + 2 * at, length, word + first, *keys)

    in_parts(part, -(-count // SHORTS_PER_WORD), count)
