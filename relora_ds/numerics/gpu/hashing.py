"""The words of `Stream`, bit for bit, within kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finalise(x):
    """The finaliser of SplitMix64, on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def words(index, first_key, second_key):
    """Words number `index` of the stream with two keys, which are of 64 bits; uint64."""
    index, first_key, second_key = (
        index.to(tl.uint64),
        first_key.to(tl.uint64),
        second_key.to(tl.uint64),
    )
    return finalise(finalise(index * 0x9E3779B97F4A7C15 + first_key) ^ second_key)
