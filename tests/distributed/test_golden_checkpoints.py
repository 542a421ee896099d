"""Runs that earlier versions saved go on to the numbers that those versions went on to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import write_manifest
from tests.distributed.launcher import metrics, run
from tests.golden.make_checkpoint import checkpoint, expected, machine, run_file

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("method", "number"), [("relora", 0), ("relora", 1), ("switchlora", 0)])
def test_resume(method: str, number: int, tmp_path: Path) -> None:
    before = json.loads(expected(method).read_text())
    code, output = run(
        [
            str(run_file(method)),
            f"output_dir={tmp_path}",
            f"checkpoint.resume={checkpoint(method, number)}",
        ]
    )
    assert code == 0, output
    found = metrics(tmp_path)
    assert sorted(found) == sorted(int(step) for step in before["metrics"])
    exact = machine() == before["machine"]
    for step, line in before["metrics"].items():
        for name, value in line.items():
            if exact:
                assert found[int(step)][name] == value, (step, name)
            elif name.endswith("loss"):
                assert found[int(step)][name] == pytest.approx(value, rel=1e-3), (step, name)


def test_a_method_state_with_gaps_exits_4(tmp_path: Path) -> None:
    saved = tmp_path / "step_5"
    shutil.copytree(checkpoint("switchlora", 0), saved)
    tensors = load_file(saved / layout.method(""))
    del tensors["pairs"]
    save_file(tensors, saved / layout.method(""))
    write_manifest(saved)
    code, output = run(
        [
            str(run_file("switchlora")),
            f"output_dir={tmp_path / 'run'}",
            f"checkpoint.resume={saved}",
        ]
    )
    assert code == 4, output
    assert "the entries of its method's state are not of the run that run.yaml describes" in output
    assert "'pairs'" in output
    assert "Traceback" not in output
