"""Exact order statistics of magnitudes that are spread over ranks.

The bit pattern of a non-negative fp32 number orders like the number, so the k-th smallest is found
by four rounds of counting bytes, most significant first. A round is one all-reduce of 256 int64 per
tensor; all tensors share it. Nothing but the counts travels, and every rank gets the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

_BUCKETS = 256
_MAGNITUDE = 0x7FFFFFFF  # all bits of an fp32 word but the sign


def order_statistics(
    values: Sequence[torch.Tensor],
    ks: Sequence[int],
    sum_over_ranks: Callable[[torch.Tensor], object],
    device: torch.device,
) -> list[torch.Tensor]:
    """k-th smallest |x| of each tensor over all ranks.

    Args:
        values: this rank's part of each tensor, fp32, 1-D, possibly empty, on any device.
        ks: 1-based k per tensor, at most its size over all ranks.
        sum_over_ranks: in-place sum of an int64 tensor over the ranks that hold the parts.
        device: where `sum_over_ranks` takes its tensors, also on a rank whose parts are all empty.

    Returns:
        One fp32 scalar per tensor, on the CPU.
    """
    wanted = torch.tensor(ks, dtype=torch.int64)
    prefix = torch.zeros(len(values), dtype=torch.int64)
    for shift in (24, 16, 8, 0):
        parts = zip(values, prefix.tolist(), strict=True)
        counts = torch.stack([_count(value, high, shift).to(device) for value, high in parts])
        sum_over_ranks(counts)
        # a column of zeros first: how many keys lie in lower buckets
        below = nn.functional.pad(counts.cpu().cumsum(dim=1), (1, 0))
        bucket = torch.searchsorted(below, wanted.unsqueeze(1)) - 1
        assert bool((bucket < _BUCKETS).all()), "k beyond the size of a tensor"
        wanted -= below.gather(1, bucket).squeeze(1)
        prefix = prefix * _BUCKETS + bucket.squeeze(1)
    return list(prefix.to(torch.int32).view(torch.float32))


def _count(value: torch.Tensor, prefix: int, shift: int) -> torch.Tensor:
    """Histogram of the byte at `shift` among the magnitudes whose higher bytes equal `prefix`."""
    assert value.dtype == torch.float32, value.dtype
    key = value.view(torch.int32) & _MAGNITUDE
    byte = (key >> shift) & (_BUCKETS - 1)
    if shift < 24:
        byte = byte[(key >> (shift + 8)) == prefix]
    return torch.bincount(byte, minlength=_BUCKETS)
