"""The subspace that a gradient chooses."""

from __future__ import annotations

from typing import Literal

import torch

from relora_ds.randomness import Stream

Decomposition = Literal["exact", "randomised"]

_OVERSAMPLED = 8
_POWER_STEPS = 2


def leading_basis(
    gradient: torch.Tensor, rank: int, svd: Decomposition, stream: Stream, right: bool
) -> torch.Tensor:
    """The leading singular vectors of a gradient along one of its sides, as orthonormal rows.

    `exact`: eigenvectors of the smaller Gram matrix in fp64, which finds what a singular value
    decomposition in fp32 does, never fails to converge and is many times as fast; vectors of the
    longer side are what the gradient makes of them, made orthonormal. `randomised`:
    `torch.svd_lowrank`. The largest entry of every row is positive: the sign of a singular vector
    is arbitrary, and would differ between devices. Whether there is a direction at all is not read:
    the host waits only where torch looks whether its decomposition converged.

    Args:
        gradient: (m, n), fp32.
        rank: r, at most min(m, n).
        stream: seeds the randomised form.
        right: whether the vectors lie along n, or along m.

    Returns:
        (r, n) or (r, m), fp32; NaN if the gradient has no direction, as it is zero or not finite.
    """
    along = gradient if right else gradient.t()
    longer = along.shape[1] > along.shape[0]
    tall = along.t() if longer else along
    size = tall.abs().amax()  # not finite if any element is
    lost = ~(size.isfinite() & (size > 0))
    if svd == "exact":
        exact = tall.double().div_(size.double())  # squares neither overflow nor vanish
        gram = (exact.t() @ exact).masked_fill_(lost, 0.0)  # no decomposition takes a NaN
        kept = exact if longer else None
        del exact
        vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
        if kept is not None:  # directions that the gradient does not have are made up
            vectors = torch.linalg.qr((kept @ vectors).masked_fill_(lost, 0.0)).Q
        basis = vectors.t()
    else:
        width = min(rank + _OVERSAMPLED, tall.shape[1])
        devices = [gradient.device] if gradient.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(stream.key[0] >> 1)
            found = torch.svd_lowrank(tall.masked_fill(lost, 0.0), q=width, niter=_POWER_STEPS)
            basis = found[0 if longer else 2][:, :rank].t()
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return (basis * largest.sign()).float().contiguous().masked_fill_(lost, torch.nan)


def choice_bytes(m: int, n: int, rank: int, svd: Decomposition, right: bool) -> int:
    """What `leading_basis` takes beside the gradient (m, n) and its result, at most.

    Exact: the gradient in fp64, then the Gram matrix, its eigenvectors and a workspace of twice the
    Gram matrix; for vectors of the longer side they are there at once. Randomised: another gradient
    in fp32, and frames of both sides and of one more.
    """
    side = min(m, n)
    if svd == "randomised":
        return 4 * (m * n + 2 * (m + n) * (rank + _OVERSAMPLED))
    longer = (n if right else m) > side
    if longer:
        return 8 * (m * n + 4 * side * side)
    return 8 * (max(m * n, 3 * side * side) + side * side)
