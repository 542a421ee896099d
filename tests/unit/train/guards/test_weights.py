"""Events that change what the model computes are refused."""

from __future__ import annotations

import math

import pytest

from relora_ds.errors import DivergenceError
from relora_ds.train.guards.weights import refuse_drift
from tests.harness.build import run_config

_RELORA = {"name": "relora", "rank": 3, "merge_every": 4, "restart_warmup_steps": 2}


@pytest.mark.parametrize(
    ("precision", "figure", "value"),
    [
        ("fp32", "method/function_drift", 1e-3),
        ("bf16", "method/function_drift", 1e-3),
        ("fp32", "method/output_drift", 1e-2),
        ("bf16", "method/output_drift", 0.5),
        ("bf16", "method/output_drift", math.nan),
    ],
)
def test_more_than_rounding_can_explain(precision: str, figure: str, value: float) -> None:
    config = run_config(_RELORA, train={"precision": precision})
    with pytest.raises(DivergenceError, match=f"merge: {figure} is .*nothing of it was saved"):
        refuse_drift({"method/event": "merge", figure: value}, config)


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"method/event": "merge", "method/function_drift": 1e-6, "method/output_drift": 1e-4},
    ],
)
def test_rounding_is_allowed(metrics: dict[str, object]) -> None:
    refuse_drift(metrics, run_config(_RELORA))
