"""GaLore at every ZeRO stage, on copies and on shares of a model."""

from __future__ import annotations

import pytest

from tests.distributed.cases import galore
from tests.harness.ranks import run_ranks


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("transport", "processes", "tensor"),
    [("none", 1, 1), ("rotate", 1, 1), ("rotate", 2, 1), ("rotate", 2, 2)],
)
def test_every_stage_equals_plain_pytorch(transport: str, processes: int, tensor: int) -> None:
    found = run_ranks(galore.check, processes, tensor=tensor, transport=transport)
    assert len(found) == 4
    for stage, result in found.items():
        assert max(result["losses"]) <= 1e-6, stage
