"""Validation during training by the protocol of published tables is what the tool computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TinyCorpus
from tests.harness.descriptions import describe
from tests.harness.run import run, write_run

pytestmark = pytest.mark.distributed
TRAIN = {"steps": 2, "seq_length": 24, "micro_batch_size": 3, "global_batch_size": 6,
         "precision": "fp32"}  # fmt: skip


def test_the_figure_of_a_run_is_that_of_the_tool(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    evaluation = {"every": 0, "batches": None, "protocol": "galore_compat"}
    sections = {"train": TRAIN, "schedule": {"warmup_steps": 1}, "eval": evaluation}
    run_file = describe(tmp_path, {"name": "full"}, 3, tiny_corpus.files, **sections)
    code, said = run([str(write_run(run_file, tmp_path / "run.yaml"))], processes=2)
    assert code == 0, said
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["final"]
    arguments = ["--checkpoint", str(tmp_path / "run"), "--data", str(tiny_corpus.valid)]
    arguments += ["--protocol", "galore_compat", "--batch-size", "3", "--ranks", "2"]
    code, said = run(arguments, script="tools/evaluate.py")
    assert code == 0, said
    found = json.loads(said.splitlines()[-1])
    for ours, theirs in (("eval/loss", "loss"), ("eval/token_loss", "token_loss")):
        assert final[ours] == pytest.approx(found[theirs], rel=1e-5)
    assert final["eval/loss"] < final["eval/token_loss"], "the counter makes it smaller"
