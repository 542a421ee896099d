"""An ordinary resume runs nothing that a file asks for, and keeps the run's own settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.cases import safe_load as cases
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed

KINDS = [(stage, "bf16", False) for stage in range(4)] + [(0, "fp32", False), (0, "bf16", True)]


@pytest.mark.parametrize(("stage", "precision", "per_layer"), KINDS)
def test_no_load_runs_code(stage: int, precision: str, per_layer: bool, tmp_path: Path) -> None:
    found = run_ranks(
        cases.restored,
        1,
        stage=stage,
        precision=precision,
        per_layer=per_layer,
        directory=tmp_path,
    )
    assert found["loads"] > 0
    assert found["unsafe"] == 0
    assert found["same"]
    assert not found["ran"]
    assert len(found["refused"]) == (1 if stage == 0 else 2)
    for words in found["refused"]:
        assert "holds posix.system, which is code and no tensor" in words
    assert found["settings"] == found["own"]
    assert 0.77 not in found["own"]


def test_ranks_that_have_read_wait_for_the_others_on_the_host(tmp_path: Path) -> None:
    """The collectives of a device have a limit, and reading has none."""
    found = run_ranks(cases.late_reader, 2, directory=tmp_path)
    last_read = max(read for read, _ in found)
    assert all(began is not None and began >= last_read for _, began in found)
