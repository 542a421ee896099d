"""Muon and SCALE at every ZeRO stage, on copies and on shares of a model."""

from __future__ import annotations

import pytest

from tests.distributed.cases import matrix_optimizers
from tests.harness.ranks import run_ranks

_CELLS = [
    ("keller", 1, 1),
    *((rule, *ranks) for rule in ("muon", "scale") for ranks in ((1, 1), (2, 1), (2, 2))),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("rule", "processes", "tensor"), _CELLS)
def test_every_stage_equals_plain_pytorch(rule: str, processes: int, tensor: int) -> None:
    found = run_ranks(matrix_optimizers.check, processes, tensor=tensor, rule=rule)
    for stage, result in found.items():
        assert result["loss"] <= 1e-6, stage
        assert result["weight"] <= 1e-5, stage
        assert result["moved"] == result["expected"], stage
        travels = processes > 1 and (stage != "0" or tensor > 1)
        assert bool(result["moved"]) is (rule != "scale" and travels), stage
