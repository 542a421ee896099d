"""Muon and SCALE at every ZeRO stage, on copies and on shares of a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.cases import matrix_optimizers
from tests.harness.ranks import run_ranks

_CELLS = [
    ("keller", 1, 1),
    ("ends", 2, 1),
    pytest.param("ends", 2, 2, marks=pytest.mark.slow),
    *((rule, *ranks) for rule in ("muon", "scale") for ranks in ((1, 1), (2, 1), (2, 2))),
]
_STEPS = [20, pytest.param(40, marks=pytest.mark.slow)]


@pytest.mark.distributed
@pytest.mark.parametrize("steps", _STEPS)
@pytest.mark.parametrize(("rule", "processes", "tensor"), _CELLS)
def test_every_stage_equals_plain_pytorch(
    rule: str, processes: int, tensor: int, steps: int
) -> None:
    found = run_ranks(matrix_optimizers.check, processes, tensor=tensor, rule=rule, steps=steps)
    for stage, result in found.items():
        assert result["loss"] <= 1e-6, stage
        assert result["weight"] <= 1e-5, stage
        assert result["moved"] == result["expected"], stage
        states = result["states"]
        if processes > 1 and stage != "0":
            assert abs(states["own"] - states["share"]) <= 2 * states["largest"], stage
        travels = processes > 1 and (stage != "0" or tensor > 1)
        assert bool(result["moved"]) is (rule in ("muon", "keller") and travels), stage


@pytest.mark.distributed
def test_resume_is_bit_exact(tmp_path: Path) -> None:
    found = run_ranks(matrix_optimizers.resumed, 2, directory=str(tmp_path))
    assert len(found) == 6
    assert all(found.values()), found
