"""How the run's settings translate into what is stored."""

from __future__ import annotations

from relora_ds.config.schema import RunConfig
from relora_ds.numerics.base_weight import Precision


def base_precision(config: RunConfig) -> Precision:
    """How edited weights are stored, with `auto` resolved."""
    chosen = config.train.base_precision
    if config.train.precision == "fp32" or chosen == "bf16":
        return "working"
    return "bf16_residual" if chosen in ("auto", "bf16_residual") else "fp32"
