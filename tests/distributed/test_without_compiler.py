"""A run that goes on where no C compiler is installed is the run that was begun with one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TinyCorpus
from tests.harness.descriptions import describe
from tests.harness.ranks import ROOT, rank_environment
from tests.harness.run import PRETRAIN, metrics, run, write_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SWITCH = {"name": "switchlora", "rank": 4, "interval": 10, "freeze_steps": 2}
MERGE = {"name": "relora", "rank": 4, "merge_every": 4, "restart_warmup_steps": 1}
CASES: dict[str, dict[str, Any]] = {
    "ages by vector": {"method": SWITCH},
    "8-bit moments": {"method": MERGE, "optimizer": {"name": "adamw8bit"}},
    "random rounding": {
        "method": MERGE,
        "stage": 0,
        "train": {"precision": "bf16", "master_weights": False, "per_layer_update": True},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_bits_do_not_depend_on_a_compiler(
    tiny_corpus: TinyCorpus, tmp_path: Path, case: str
) -> None:
    sections = dict(CASES[case])
    method, stage = sections.pop("method"), sections.pop("stage", 1)
    run_file = describe(tmp_path, method, stage, tiny_corpus.files, **sections)
    path = str(write_run(run_file, tmp_path / "run.yaml"))
    code, said = run([path])
    assert code == 0, said
    unbroken, resumed = tmp_path / "run", tmp_path / "resumed"
    changes = [f"output_dir={resumed}", f"checkpoint.resume={unbroken}/checkpoints/step_5"]
    (tmp_path / "empty").mkdir()
    environment = rank_environment() | {"PATH": str(tmp_path / "empty")}
    environment.pop("CC", None)
    ended = subprocess.run(
        [sys.executable, PRETRAIN, path, *changes],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "install a C compiler or set CC" in ended.stdout + ended.stderr
    assert "not bit for bit" not in ended.stdout + ended.stderr
    before, after = metrics(unbroken), metrics(resumed)
    assert sorted(after) == list(range(6, 12))
    assert {s: line["train/loss"] for s, line in after.items()} == {
        s: before[s]["train/loss"] for s in after
    }
    weights = [load_file(output / "hf" / "model.safetensors") for output in (unbroken, resumed)]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
