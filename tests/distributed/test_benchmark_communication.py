"""The benchmark's figures are complete, and its bytes those of the closed form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness.run import run

pytestmark = pytest.mark.distributed


@pytest.mark.slow
def test_measured_bytes_are_the_expected_ones(tmp_path: Path) -> None:
    arguments = ["--model", "configs/model/llama_quickstart.json", "--methods", "relora"]
    arguments += ["--stages", "2", "3", "--accumulation", "2", "--rank", "4", "--steps", "1"]
    arguments += ["--seq-length", "16", "--micro-batch-size", "1", "--reduction", "step"]
    arguments += ["--output", str(tmp_path / "bench")]
    code, output = run(arguments, 2, "benchmarks/communication.py")
    assert code == 0, output
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["processes"] == 2
    assert [row["stage"] for row in found["rows"]] == [2, 3]
    for row in found["rows"]:
        assert row["exact"]
        assert row["wire_bytes"] == row["expected_wire_bytes"] > 0
        assert sum(each["wire"] for each in row["measured"].values()) == row["wire_bytes"]
        assert row["bytes_per_second"] > 0
        assert 0 < row["communication_share"] <= 1
    assert (tmp_path / "bench.png").stat().st_size > 1000
    assert "ZeRO" in output
