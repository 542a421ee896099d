"""Spectral updates of pairs at every ZeRO stage, on copies and on shares of a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.cases import spectral
from tests.harness.ranks import run_ranks

_CELLS = [
    ("low_rank", 1, 1, "auto"),
    ("low_rank", 2, 1, "auto"),
    ("sltrain", 2, 1, "auto"),
    ("lora", 2, 2, "act"),
    ("switchlora", 2, 1, "auto"),
    ("relora", 2, 2, "fold"),
    pytest.param("relora", 2, 1, "auto", marks=pytest.mark.slow),
    pytest.param("switchlora", 2, 2, "act", marks=pytest.mark.slow),
    pytest.param("switchlora", 4, 2, "fold", marks=pytest.mark.slow),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("method", "processes", "tensor", "plan"), _CELLS)
def test_every_stage_equals_the_dense_formula(
    method: str, processes: int, tensor: int, plan: str
) -> None:
    found = run_ranks(spectral.check, processes, method=method, tensor=tensor, plan=plan)
    copies = processes // tensor
    for stage, result in found.items():
        assert result["loss"] <= 1e-5, stage
        assert result["weight"] <= 1e-5, stage
        assert result["moved"] == result["expected"], stage
        assert bool(result["moved"]) is (tensor > 1 or (copies > 1 and stage != "0")), stage
        if tensor == 1:  # one moment per element of a factor, on every rank at stage 0
            assert result["held"] == (copies if stage == "0" else 1) * result["factors"], stage


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("method", "tensor", "plan", "stage"),
    [("switchlora", 1, "auto", 3), ("relora", 2, "fold", 1)],
)
def test_a_resumed_run_is_the_same_run(
    tmp_path: Path, method: str, tensor: int, plan: str, stage: int
) -> None:
    arguments = {"method": method, "tensor": tensor, "plan": plan, "stage": stage}
    found = run_ranks(spectral.resume, 2, directory=tmp_path, **arguments)
    assert found["whole"] == found["resumed"]
