"""A matrix-wise optimizer on slices computes what plain PyTorch does on whole matrices."""

from __future__ import annotations

import pytest

from tests.contract import toy_reference
from tests.harness.ranks import run_ranks


@pytest.mark.distributed
@pytest.mark.parametrize(("processes", "tensor"), [(1, 1), (2, 1), (2, 2)])
def test_every_stage_equals_plain_pytorch(processes: int, tensor: int) -> None:
    for stage, found in run_ranks(toy_reference.check, processes, tensor=tensor).items():
        assert found["loss"] <= 1e-5, stage
        assert found["weight"] <= 1e-5, stage
