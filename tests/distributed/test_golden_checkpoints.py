"""Runs that earlier versions saved go on to the numbers that those versions went on to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import write_manifest
from tests.golden.make_checkpoint import checkpoint, expected, machine, run_file
from tests.harness.run import metrics, run

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("method", "number"), [("relora", 0), ("relora", 1), ("switchlora", 0)])
def test_resume(method: str, number: int, tmp_path: Path) -> None:
    assert_goes_on(method, checkpoint(method, number), tmp_path)


def test_resume_of_the_rewritten_one(tmp_path: Path) -> None:
    rewritten = tmp_path / "rewritten"
    code, output = run(
        [
            *("--checkpoint", str(checkpoint("relora", 0)), "--output", str(rewritten)),
            *("--data-parallel", "1", "--tensor", "1", "--zero-stage", "2"),
        ],
        script="tools/reshape_checkpoint.py",
    )
    assert code == 0, output
    assert_goes_on("relora", rewritten, tmp_path / "run")


def assert_goes_on(method: str, saved: Path, output_dir: Path) -> None:
    """Assert that a run continues a checkpoint to the numbers that were recorded."""
    before = json.loads(expected(method).read_text())
    run_of = (str(run_file(method)), f"output_dir={output_dir}")
    # those versions knew no other formulation
    code, output = run([*run_of, f"checkpoint.resume={saved}", "train.formulation=split"])
    assert code == 0, output
    found = metrics(output_dir)
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
    output = refused("switchlora", saved, tmp_path)
    assert "the entries of its method's state cannot be those of this run" in output
    assert "'pairs'" in output


def test_a_change_that_was_permitted_but_does_not_fit_exits_4(tmp_path: Path) -> None:
    changes = ("method.rank=4", "checkpoint.allow_change=[method.rank]")
    output = refused("relora", checkpoint("relora", 0), tmp_path, *changes)
    assert "its weights and optimizer states cannot be those of this run" in output


def refused(method: str, saved: Path, directory: Path, *changes: str) -> str:
    """What is printed when a run refuses to continue a checkpoint."""
    run_of = (str(run_file(method)), f"output_dir={directory / 'run'}")
    code, output = run([*run_of, f"checkpoint.resume={saved}", *changes])
    assert code == 4, output
    assert "Traceback" not in output
    return output
