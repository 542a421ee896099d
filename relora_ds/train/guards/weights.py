"""What may be saved: weights that still compute what they did before an event."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relora_ds.checkpoint.find import list_checkpoints
from relora_ds.config.schema import RunConfig
from relora_ds.engine.precision import base_precision
from relora_ds.errors import DivergenceError

_EXACT, _LOSSY = 1e-4, 0.05
"""Largest `method/function_drift` of an event. The rounding of an edit makes 1e-8 to 1e-6 of it,
and up to 1e-2 where edits are rounded to bf16."""
_OUTPUT = {"fp32": 1e-3, "bf16": 0.2}
"""Largest `method/output_drift` by the working precision, whose rounding it holds as well."""


def refuse_drift(metrics: Mapping[str, Any], config: RunConfig) -> None:
    """Make sure that an event left the model's function alone.

    Args:
        metrics: of a line of the log.
        config: says how weights are kept.

    Raises:
        DivergenceError: it changed by more than rounding can explain.
    """
    precision = config.train.precision
    lossy = precision == "bf16" and base_precision(config) == "working"
    limits = {
        "method/function_drift": _LOSSY if lossy else _EXACT,
        "method/output_drift": _OUTPUT[precision],
    }
    for name, limit in limits.items():
        drift = metrics.get(name)
        if drift is None or (math.isfinite(drift) and drift <= limit):
            continue
        remedy = "write train.base_precision: bf16_residual, or " if lossy else ""
        raise DivergenceError(
            f"{metrics.get('method/event', 'an event')}: {name} is {drift:.3g}, but must stay "
            f"below {limit:g} in {precision}: the event changed what the model computes, and "
            f"nothing of it was saved; {remedy}check the machine's memory and any change to the "
            "method, and resume from the last checkpoint"
        )


def newest_good(directory: Path) -> str:
    """What to go on from, in words: a checkpoint is only saved when everything in it is finite."""
    found = list_checkpoints(directory)
    return f"resume from {found[-1]}" if found else "start again: no checkpoint was saved yet"
