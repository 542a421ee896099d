"""The subspace that a gradient chooses."""

from __future__ import annotations

import math
from typing import Literal

import torch

from relora_ds.randomness import Stream

_OVERSAMPLED = 8
_POWER_STEPS = 2


def leading_basis(
    gradient: torch.Tensor, rank: int, svd: Literal["exact", "randomised"], stream: Stream
) -> torch.Tensor | None:
    """The leading singular vectors of a gradient along its shorter side, as orthonormal rows.

    `exact`: eigenvectors of the smaller Gram matrix in fp64, which finds what a singular value
    decomposition in fp32 does, never fails to converge and is many times as fast. `randomised`:
    `torch.svd_lowrank`. The largest entry of every row is positive: the sign of a singular vector
    is arbitrary, and would differ between devices.

    Args:
        gradient: (m, n), fp32.
        rank: r, at most min(m, n).
        stream: seeds the randomised form.

    Returns:
        (r, min(m, n)), fp32; None if the gradient has no direction, as it is zero or not finite.
    """
    extent = gradient.abs().max()  # zero, or not finite, where there is no direction
    if not 0.0 < float(extent) < math.inf:
        return None
    tall = gradient if gradient.shape[0] >= gradient.shape[1] else gradient.t()
    if svd == "exact":
        exact = tall.double() / extent.double()  # squares neither overflow nor vanish
        basis = torch.linalg.eigh(exact.t() @ exact).eigenvectors[:, -rank:].flip(1).t()
    else:
        width = min(rank + _OVERSAMPLED, tall.shape[1])
        devices = [gradient.device] if gradient.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(stream.key[0] >> 1)
            basis = torch.svd_lowrank(tall, q=width, niter=_POWER_STEPS)[2][:, :rank].t()
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return (basis * largest.sign()).float().contiguous()
