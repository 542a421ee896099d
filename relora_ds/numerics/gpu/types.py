"""Triton's names for the types of tensors, and how values get from one to another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}


@triton.jit
def converted(values, target_type: tl.constexpr):
    """Values of another type; fp32 to bf16 as torch rounds it, to nearest and ties to even.

    In integers, because Triton's interpreter rounds otherwise.
    """
    if values.dtype == tl.float32 and target_type == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        upper = tl.where(values == values, upper, 0x7FC0)
        return upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values.to(target_type)
