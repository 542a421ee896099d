"""Resetting moments at a restart, on whatever part of them this rank holds.

Every mask is a pure function of (seed, parameter name, restart, element), or of an exact order
statistic over the whole parameter, so the outcome does not depend on how the state is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce

import torch
from torch import nn

from relora_ds.config.methods.relora import ResetConfig
from relora_ds.errors import DivergenceError
from relora_ds.methods.train_state import Moments, MomentShard, Weights
from relora_ds.optim.vector_adamw import MOMENTS
from relora_ds.randomness import Stream

_SURE = 100
"""Moments that a rule must ask for before it is a fault that it got none: draws may miss a few."""


def reset_moments(
    moments: Moments,
    weights: Weights,
    parameters: Mapping[str, nn.Parameter],
    config: ResetConfig,
    seed: int,
    event: int,
) -> torch.Tensor:
    """Prune the moments of `parameters` by the configured rule.

    Args:
        moments: of the live run.
        weights: knows the global shapes of the parameters.
        parameters: by full name; the name is part of the random draws.
        event: number of the restart.

    Returns:
        How many moment elements were not zero before and are not zero now, over all ranks: int64,
        (2,), on the device, for `reset_share`. Nothing is waited for.
    """
    everything = list(parameters.values())
    before = moments.count_non_zero(everything)
    shards = {name: moments.shard(parameter) for name, parameter in parameters.items()}
    if config.mode == "magnitude":
        masks = _magnitude_masks(moments, weights, parameters, shards, config.fraction)
    else:
        masks = {
            name: _random_masks(shard, name, config, seed, event)
            for name, shard in shards.items()
            if shard is not None
        }
    for name, shard in shards.items():
        if shard is None:
            continue
        survivors = masks[name]
        if config.joint:
            survivors = [reduce(torch.logical_and, survivors)] * len(survivors)
        for moment, survive in zip(shard.moments, survivors, strict=True):
            moment.masked_fill_(~survive, 0.0)
    return torch.stack([before, moments.count_non_zero(everything)])


def reset_share(before: int, after: int, config: ResetConfig) -> float:
    """The share of non-zero moments that a restart set to zero.

    Args:
        before: moments that were not zero, over all ranks.
        after: those that still are not.
        config: the rule that was applied.

    Raises:
        DivergenceError: every moment was zero already, so nothing could be reset; or none was
            reset, though the rule asks for many.
    """
    if not before:
        raise DivergenceError(
            "every moment of the adapters is zero at a restart: they got no gradient since "
            "the last one; look for a learning rate, mask or loss that cuts them off"
        )
    asked = 1.0 if config.mode == "zero" else config.fraction
    if after == before and asked * before >= _SURE:
        raise DivergenceError(
            f"a restart reset none of {before:,} moments of the adapters that are not zero, though "
            f"method.reset.mode {config.mode} asks for {asked:.2%} of them: most are zero, so that "
            "none lies below the quantile, or the state is not where it is looked for; use "
            "method.reset.mode zero"
        )
    return 1.0 - after / before


def _random_masks(
    shard: MomentShard, name: str, config: ResetConfig, seed: int, event: int
) -> list[torch.Tensor]:
    """Which elements of each moment survive. `zero` keeps none; `random` those whose uniform draw
    is more than the fraction, one draw per moment."""
    if config.mode == "zero":
        none = torch.zeros_like(shard.moments[0], dtype=torch.bool)
        return [none] * len(shard.moments)
    drawn = [
        shard.uniform(Stream(seed, f"reset.{moment}", name, event)) > config.fraction
        for moment in MOMENTS[: len(shard.moments)]
    ]
    # a joint mask is one draw: the intersection of two would keep (1 - p)^2 instead of 1 - p
    return drawn[:1] * len(drawn) if config.joint else drawn


def _magnitude_masks(
    moments: Moments,
    weights: Weights,
    parameters: Mapping[str, nn.Parameter],
    shards: Mapping[str, MomentShard | None],
    fraction: float,
) -> dict[str, list[torch.Tensor]]:
    """Survivors are strictly larger than the quantile `fraction` of the parameter's magnitudes.

    The threshold is the order statistic at which `torch.quantile` starts to interpolate, so the
    surviving set is the published one; ties with it are dropped.
    """
    counts = [weights.shape(parameter).numel() for parameter in parameters.values()]
    ks = [math.floor(fraction * (count - 1)) + 1 for count in counts]
    thresholds = moments.order_statistics(list(parameters.values()), ks)
    masks = {}
    for (name, shard), of_each in zip(shards.items(), thresholds, strict=True):
        if shard is not None:
            pairs = zip(shard.moments, of_each, strict=True)
            masks[name] = [moment.abs() > threshold for moment, threshold in pairs]
    return masks
