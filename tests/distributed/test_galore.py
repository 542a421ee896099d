"""GaLore at every ZeRO stage, on copies and on shares of a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.cases import galore
from tests.harness.ranks import run_ranks


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("transport", "side", "processes", "tensor"),
    [
        ("none", "shorter", 1, 1),
        ("rotate", "longer", 1, 1),
        ("rotate", "shorter", 2, 1),
        ("rotate", "shorter", 2, 2),
        pytest.param("rotate", "left", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_every_stage_equals_plain_pytorch(
    transport: str, side: str, processes: int, tensor: int
) -> None:
    found = run_ranks(galore.check, processes, tensor=tensor, transport=transport, side=side)
    assert len(found) == 4
    for stage, result in found.items():
        assert max(result["losses"]) <= 1e-6, stage
        assert result["weights"] <= 1e-5, stage
        states = result["states"]
        if processes > tensor and stage != "0":
            assert abs(states["own"] - states["share"]) <= 2 * states["largest"], stage


@pytest.mark.distributed
def test_a_weight_moves_within_one_subspace_per_gap() -> None:
    found = run_ranks(galore.subspaces, 1)
    assert found["changed"] == [0, 4, 8]
    assert found["unit"]["fp32"] <= 1e-5
    assert found["unit"]["bf16"] <= 1e-2
    assert found["ratios"].keys() == {1, 2, 3}
    assert max(found["ratios"].values()) <= 1e-5
    assert found["steps"] == 4


@pytest.mark.distributed
def test_resume_is_bit_exact_around_a_refresh(tmp_path: Path) -> None:
    found = run_ranks(galore.resumed, 2, directory=str(tmp_path))
    assert len(found) == 9
    assert all(found.values()), found


@pytest.mark.distributed
def test_bytes_are_those_of_the_factor_and_a_refresh_moves_each_gradient_once() -> None:
    for stage, result in run_ranks(galore.moved, 2).items():
        assert result["recorded"][1] == result["expected"], stage
        assert result["refresh"] == result["refresh_expected"], stage


@pytest.mark.distributed
def test_other_ways_to_take_a_step_agree() -> None:
    found = run_ranks(galore.variants, 2)
    plain = found.pop("plain")
    same = ("recomputed", "per layer", "one reduction", "offloaded", "offloaded in slices")
    for name in same:
        assert found[name] == pytest.approx(plain, rel=1e-6), name
    for name, losses in found.items():
        assert losses == pytest.approx(plain, rel=2e-2), name
