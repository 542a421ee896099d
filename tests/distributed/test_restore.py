"""A checkpoint that one rank cannot read after all is refused by all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.cases import restore as cases
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_one_rank_cannot_read_is_the_verdict_of_all(stage: int, tmp_path: Path) -> None:
    found = run_ranks(cases.refused, 2, stage=stage, directory=tmp_path)
    assert found.pop("nothing") == ["", ""]
    for words in found.values():
        assert words[0] == words[1]
        assert words[0].startswith("rank 1: ")
        assert "\n" not in words[0]
    assert "model_states.pt" in found["shard"][0]
    assert "Input/output error" in found["shard"][0]
    assert "bad header" in found["damaged shard"][0]
    assert "Input/output error" in found["side"][0]
    assert "EOFError: the stream ended" in found["method"][0]
