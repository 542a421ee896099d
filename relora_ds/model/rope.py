"""Rotary position embedding in the Hugging Face convention (halves, not interleaved pairs).

Shape suffixes: B batch, S sequence, N heads, H head dim, R = H / 2 rotated pairs.
"""

# ruff: noqa: N803, N806 - capital suffixes are tensor shapes
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from relora_ds.config.model import RopeScaling
from relora_ds.model.rope_scaling import rotary_frequencies
from relora_ds.numerics.compiled import compiled


@lru_cache(maxsize=16)
def rotary_tables(
    head_dim: int,
    theta: float,
    length: int,
    device: torch.device,
    scaling: RopeScaling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions 0 .. length - 1: two fp32 tensors (S, R) on `device`.

    A memoised function, not a module buffer: DeepSpeed calls `module.bfloat16()`, which casts float
    buffers as well, and bf16 cannot tell neighbouring positions apart beyond 256. The tables are
    computed on the CPU so that every kind of device rotates by the same bits.

    Args:
        head_dim: H, even.
        theta: base of the frequencies.
        length: S.
        device: where the tables are used.
        scaling: change of the frequencies for longer contexts.
    """
    # A table made under inference_mode could not be saved for a later backward pass.
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        frequency_R, factor = rotary_frequencies(head_dim, theta, scaling)
        angle_SR = torch.outer(torch.arange(length, dtype=torch.float32), frequency_R)
        cos_SR, sin_SR = angle_SR.cos() * factor, angle_SR.sin() * factor
        return cos_SR.to(device), sin_SR.to(device)


def rotate(x_BSNH: torch.Tensor, cos_SR: torch.Tensor, sin_SR: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + R]) of every head by its position's angle.

    Args:
        x_BSNH: queries or keys, any float dtype.
        cos_SR: fp32, from `rotary_tables`; (B, S, R) where sequences count positions differently.
        sin_SR: fp32, from `rotary_tables`, likewise.

    Returns:
        (B, S, N, H) in x's dtype; the rotation itself is done in fp32. Not differentiable twice.
    """
    turned = _Rotation.apply(x_BSNH, cos_SR, sin_SR)
    assert isinstance(turned, torch.Tensor)
    return turned


@compiled
def rotate_compiled(
    x_BSNH: torch.Tensor, cos_SR: torch.Tensor, sin_SR: torch.Tensor
) -> torch.Tensor:
    """Turn each pair of every head as `rotate` does, in one pass of a compiled kernel.

    Args:
        x_BSNH: queries or keys, any float dtype.
        cos_SR: fp32, from `rotary_tables`; (B, S, R) where sequences count positions differently.
        sin_SR: fp32, from `rotary_tables`, likewise.

    Returns:
        (B, S, N, H) in x's dtype.
    """
    cos_S1R, sin_S1R = cos_SR.unsqueeze(-2), sin_SR.unsqueeze(-2)
    first_BSNR, second_BSNR = x_BSNH.unflatten(-1, (2, -1)).unbind(-2)
    turned = (
        first_BSNR * cos_S1R - second_BSNR * sin_S1R,
        second_BSNR * cos_S1R + first_BSNR * sin_S1R,
    )
    return torch.cat(turned, -1).to(x_BSNH.dtype)


class _Rotation(torch.autograd.Function):
    """A rotation that keeps the tables only; its gradient is turned back by the same angles."""

    @staticmethod
    def forward(
        ctx: Any, x_BSNH: torch.Tensor, cos_SR: torch.Tensor, sin_SR: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos_SR, sin_SR)
        return _turn(x_BSNH, cos_SR, sin_SR, 1.0)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_BSNH: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        cos_SR, sin_SR = ctx.saved_tensors
        return _turn(grad_BSNH, cos_SR, sin_SR, -1.0), None, None


def _turn(
    x_BSNH: torch.Tensor, cos_SR: torch.Tensor, sin_SR: torch.Tensor, direction: float
) -> torch.Tensor:
    """Rotate forwards (1.0) or backwards (-1.0), in three passes without copies of halves."""
    cos_S11R, sin_S1R = cos_SR[..., None, None, :], sin_SR.unsqueeze(-2)
    x_BSN2R = x_BSNH.unflatten(-1, (2, -1))
    turned_BSN2R = x_BSN2R * cos_S11R
    first_BSNR, second_BSNR = x_BSN2R.unbind(-2)
    turned_BSN2R[..., 0, :].addcmul_(second_BSNR, sin_S1R, value=-direction)
    turned_BSN2R[..., 1, :].addcmul_(first_BSNR, sin_S1R, value=direction)
    return turned_BSN2R.flatten(-2).to(x_BSNH.dtype)
