"""Exact order statistics of magnitudes that are spread over ranks.

The bit pattern of a non-negative fp32 number orders like the number, so the k-th smallest is found
by four rounds of counting bytes, most significant first. A round is one all-reduce of 256 int64 per
tensor; all tensors share it. Nothing but the counts travels, every rank gets the same result, and
the host waits for nothing: what a round found stays on the device for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from relora_ds.numerics.transfers import orderless_writes, upload

_BUCKETS = 256
_MAGNITUDE = 0x7FFFFFFF  # all bits of an fp32 word but the sign
# Histograms that are added up at the end: a device that adds to one place at a time would otherwise
# wait for itself, since most magnitudes of a tensor share their first byte.
_LANES = {"cpu": 1}
_MANY_LANES = 64


def order_statistics(
    values: Sequence[torch.Tensor],
    ks: Sequence[int],
    sum_over_ranks: Callable[[torch.Tensor], object],
    device: torch.device,
) -> list[torch.Tensor]:
    """k-th smallest |x| of each tensor over all ranks.

    Args:
        values: this rank's part of each tensor, fp32, 1-D, possibly empty, on any device.
        ks: 1-based k per tensor.
        sum_over_ranks: in-place sum of an int64 tensor over the ranks that hold the parts.
        device: where `sum_over_ranks` takes its tensors, also on a rank whose parts are all empty.
            Parts elsewhere are waited for, once a round.

    Returns:
        One fp32 scalar per tensor, on its device; NaN where k is none of 1 to the tensor's size
        over all ranks.
    """
    wanted = upload(torch.tensor(ks, dtype=torch.int64), device).unsqueeze(1)
    prefix = torch.zeros_like(wanted)
    inside = torch.ones_like(wanted, dtype=torch.bool)
    lanes = {(len(v), v.device): _lane_starts(len(v), v.device) for v in values}
    for shift in (24, 16, 8, 0):
        counts = torch.stack(
            [
                _count(value, high, shift, lanes[len(value), value.device]).to(device)
                for value, high in zip(values, _beside(values, prefix), strict=True)
            ]
        )
        sum_over_ranks(counts)
        # a column of zeros first: how many keys lie in lower buckets
        below = nn.functional.pad(counts.cumsum(dim=1), (1, 0))
        bucket = (below < wanted).sum(dim=1, keepdim=True) - 1
        inside &= (bucket >= 0) & (bucket < _BUCKETS)
        bucket = bucket.clamp(0, _BUCKETS - 1)
        wanted = wanted - below.gather(1, bucket)
        prefix = prefix * _BUCKETS + bucket
    found = prefix.to(torch.int32).view(torch.float32)
    return _beside(values, torch.where(inside, found, torch.nan))


def _beside(values: Sequence[torch.Tensor], column: torch.Tensor) -> list[torch.Tensor]:
    """The elements of (tensors, 1), each on the device of its tensor."""
    flat = column.flatten()
    on_device = {device: flat.to(device).unbind() for device in {v.device for v in values}}
    return [on_device[value.device][number] for number, value in enumerate(values)]


def _lane_starts(length: int, device: torch.device) -> torch.Tensor:
    """Where the histogram begins that an element is counted in; int32, (length,)."""
    lanes = _LANES.get(device.type, _MANY_LANES)
    number = torch.arange(length, dtype=torch.int32, device=device) % lanes
    return number * (_BUCKETS + 1)


def _count(
    value: torch.Tensor, prefix: torch.Tensor, shift: int, lane_starts: torch.Tensor
) -> torch.Tensor:
    """Histogram of the byte at `shift` among the magnitudes whose higher bytes equal `prefix`."""
    assert value.dtype == torch.float32, value.dtype
    key = value.view(torch.int32) & _MAGNITUDE
    bucket = (key >> shift) & (_BUCKETS - 1)
    if shift < 24:
        bucket = torch.where((key >> (shift + 8)) == prefix, bucket, _BUCKETS)
    # neither `bincount` nor a selection: they ask the device how much there is
    lanes = _LANES.get(value.device.type, _MANY_LANES)
    counts = torch.zeros(lanes * (_BUCKETS + 1), dtype=torch.int64, device=value.device)
    with orderless_writes():
        counts.index_add_(0, bucket + lane_starts, counts.new_ones(1).expand(len(bucket)))
    return counts.view(lanes, -1).sum(dim=0)[:_BUCKETS]
