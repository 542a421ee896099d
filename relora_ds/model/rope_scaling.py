"""Rotary frequencies, plain or changed for longer contexts, bit for bit as transformers has them.

Shape suffixes: H head dim, R = H / 2 rotated pairs.
"""

# ruff: noqa: N803, N806 - capital suffixes are tensor shapes
from __future__ import annotations

import math

import torch

from relora_ds.config.model import LinearRope, Llama3Rope, RopeScaling, YarnRope


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[torch.Tensor, float]:
    """Radians per position of every pair: fp32 (R,), and a factor on cosines and sines.

    Args:
        head_dim: H, even.
        theta: base of the frequencies.
        scaling: how they are changed; None for not at all.
    """
    exponent_R = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequency_R = 1.0 / theta**exponent_R
    if scaling is None:
        return frequency_R, 1.0
    if isinstance(scaling, LinearRope):
        return frequency_R / scaling.factor, 1.0
    if isinstance(scaling, Llama3Rope):
        return _by_wavelength(frequency_R, scaling), 1.0
    return _by_turns(theta**exponent_R, head_dim, theta, scaling), _attention_factor(scaling)


def _by_wavelength(frequency_R: torch.Tensor, rope: Llama3Rope) -> torch.Tensor:
    length, low, high = (
        rope.original_max_position_embeddings,
        rope.low_freq_factor,
        rope.high_freq_factor,
    )
    wavelength_R = 2 * math.pi / frequency_R
    is_long_R = wavelength_R > length / low
    is_between_R = ~(wavelength_R < length / high) & ~is_long_R
    scaled_R = torch.where(is_long_R, frequency_R / rope.factor, frequency_R)
    smooth_R = (length / wavelength_R - low) / (high - low)
    mixed_R = (1 - smooth_R) * scaled_R / rope.factor + smooth_R * scaled_R
    return torch.where(is_between_R, mixed_R, scaled_R)


def _by_turns(period_R: torch.Tensor, head_dim: int, theta: float, rope: YarnRope) -> torch.Tensor:
    def dimension(turns: float) -> float:
        """Dimension whose pair makes that many turns over the original length."""
        length = rope.original_max_position_embeddings
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    position_R = torch.arange(head_dim // 2, dtype=torch.float32)
    kept_R = 1 - ((position_R - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * period_R) * (1 - kept_R) + 1.0 / period_R * kept_R


def _attention_factor(rope: YarnRope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _warmth(rope.factor, rope.mscale) / _warmth(rope.factor, rope.mscale_all_dim)
    return _warmth(rope.factor, 1.0)


def _warmth(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
