"""Changes of weights in few bits, for slow links.

16 bits are bf16. With 8 or 4 bits a block of 256 neighbours shares one fp32 scale, its largest
magnitude over 127 or 7, and an element is its nearest multiple; two codes of 4 bits share a byte.
Everything is rounded to nearest, so that decoding gives the same bits on every machine.
"""

from __future__ import annotations

from typing import Literal

import torch

Bits = Literal[4, 8, 16, 32]
BLOCK = 256
"""Elements that share a scale."""

_LARGEST = {4: 7.0, 8: 127.0}
_SCALE_BYTES = 4


def coded_bytes(elements: int, bits: int) -> int:
    """Size of the code of so many elements."""
    if bits not in _LARGEST:
        return elements * bits // 8
    blocks = -(-elements // BLOCK)
    return blocks * (BLOCK * bits // 8 + _SCALE_BYTES)


def encode(values: torch.Tensor, bits: Bits) -> torch.Tensor:
    """The code of (N,) fp32 values, finite, as (`coded_bytes`,) uint8 on their device."""
    if bits == 32:
        return values.contiguous().view(torch.uint8)
    if bits == 16:
        return values.to(torch.bfloat16).view(torch.uint8)
    rows = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = rows.abs().amax(dim=1, keepdim=True) / _LARGEST[bits]
    # a block of zeros has no scale to divide by, one of denormals none that divides well
    codes = (rows / scales.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
    codes = codes.clamp_(-int(_LARGEST[bits]), int(_LARGEST[bits]))
    if bits == 4:
        low, high = codes[:, 0::2] & 15, codes[:, 1::2] << 4
        codes = low | high
    return torch.cat([codes.view(torch.uint8).view(-1), scales.view(-1).view(torch.uint8)])


def decode(code: torch.Tensor, elements: int, bits: Bits) -> torch.Tensor:
    """The fp32 values (`elements`,) that a code stands for, on its device."""
    if bits == 32:
        return code.view(torch.float32)
    if bits == 16:
        return code.view(torch.bfloat16).float()
    blocks = -(-elements // BLOCK)
    packed, scales = code.split([blocks * BLOCK * bits // 8, blocks * _SCALE_BYTES])
    codes = packed.view(torch.int8)
    if bits == 4:  # shifts of int8 carry the sign
        codes = torch.stack([codes << 4 >> 4, codes >> 4], dim=1).view(-1)
    values = codes.view(blocks, BLOCK).float() * scales.view(torch.float32).unsqueeze(1)
    return values.view(-1)[:elements]
