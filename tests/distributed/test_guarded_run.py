"""Whole runs that meet what is not to be believed, and runs that are started again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.harness.run import metrics, run, write_run

pytestmark = pytest.mark.distributed


def tree(directory: Path) -> dict[str, bytes]:
    """Content of every file of a run but its logs."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in files if p.suffix != ".log"}


def test_a_destroyed_model_is_neither_saved_nor_exported(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    """The last update is the one that destroys it: its loss and gradient were fine."""
    tiny_run["method"] = {"name": "lora", "rank": 4}
    tiny_run["train"] |= {"steps": 2}
    tiny_run["optimizer"] = {"lr": 1e38, "clip": 0.0, "weight_decay": 100.0}
    tiny_run["schedule"] = {"warmup_steps": 1, "min_lr_ratio": 1.0}
    tiny_run["checkpoint"] = {"every": 1}
    code, output = run([str(write_run(tiny_run, tmp_path / "run.yaml"))], processes=2)
    assert code == 5, output
    assert "nothing of it was saved" in output
    assert "step_1" in output
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_1"]
    assert not (tmp_path / "run" / "hf").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"


def test_weights_too_large_to_compute_with_are_not_saved(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    """They are finite themselves, and no evaluation looks at them before the save."""
    tiny_run["method"] = {"name": "lora", "rank": 4}
    tiny_run["train"] |= {"steps": 4}
    tiny_run["optimizer"] = {"lr": 1e30, "clip": 0.0}
    tiny_run["schedule"] = {"warmup_steps": 1, "min_lr_ratio": 1.0}
    tiny_run["checkpoint"] = {"every": 1}
    tiny_run["eval"] = {"every": 0}
    code, output = run([str(write_run(tiny_run, tmp_path / "run.yaml"))], processes=2)
    assert code == 5, output
    assert "step 2: not finite after the update: the model's output" in output
    assert f"resume from {tmp_path / 'run' / 'checkpoints' / 'step_1'}" in output
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_1"]
    assert not (tmp_path / "run" / "hf").exists()


def test_a_start_from_weights_that_are_not_finite_is_refused(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    """Whether ZeRO cuts the model as it is read or not."""
    tiny_run["train"]["steps"] = 7
    tiny_run["checkpoint"] = {"every": 0}
    code, output = run([str(write_run(tiny_run, tmp_path / "run.yaml"))])
    assert code == 0, output
    name = "model.layers.1.mlp.up_proj.weight"
    export = tmp_path / "run" / "hf" / "model.safetensors"
    tensors = load_file(export)
    tensors[name][2, 1] = torch.nan
    save_file(tensors, export)
    tiny_run["train"]["init_from"] = str(export.parent)
    tiny_run["output_dir"] = str(tmp_path / "second")
    path = str(write_run(tiny_run, tmp_path / "second.yaml"))
    for stage in (1, 3):
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        code, output = run([path], processes=2)
        assert code == 4, output
        assert f"{name} holds values that are not finite" in output
        assert "Traceback" not in output


def test_a_warm_start_leaves_nothing_of_its_engine(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    tiny_run["method"] |= {"warm_start_steps": 2}
    tiny_run["train"] |= {"steps": 5, "precision": "bf16"}
    tiny_run["schedule"] = {"warmup_steps": 1}
    for stage in (0, 1, 2, 3):
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        path = write_run(tiny_run | {"output_dir": str(tmp_path / str(stage))}, tmp_path / "r.yaml")
        code, output = run([str(path)], processes=2)
        assert code == 0, output
        assert "hands over to relora" in output
        assert "was not freed" not in output, f"stage {stage}"


def test_a_rollback_ends_as_the_run_that_never_saw_the_batch(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    """Gradient norms are spikes at a bound this tight: both runs leave the same steps out."""
    ends: dict[str, Any] = {}
    for action in ("skip", "rollback"):
        spike = {"action": action, "sigma": 1.2, "window": 16}
        tiny_run["guards"] = {"loss_spike": spike, "max_events": 4}
        tiny_run["output_dir"] = str(tmp_path / action)
        tiny_run["checkpoint"] = {"every": 2, "keep": None}
        code, output = run([str(write_run(tiny_run, tmp_path / "run.yaml"))], processes=2)
        assert code == 0, output
        noted = (tmp_path / action / "logs" / "bad_batches.jsonl").read_text().splitlines()
        lines = metrics(tmp_path / action)
        ends[action] = (
            {json.loads(line)["step"] for line in noted},
            {step: line["train/loss"] for step, line in lines.items()},
            load_file(tmp_path / action / "hf" / "model.safetensors"),
        )
        counted = json.loads((tmp_path / action / "summary.json").read_text())["final"]
        assert counted["guards/skipped_steps"] == len(ends[action][0]) > 0
        assert counted["guards/rollbacks"] == (len(ends[action][0]) if action == "rollback" else 0)
    assert ends["skip"][:2] == ends["rollback"][:2]
    skipped, rolled = ends["skip"][2], ends["rollback"][2]
    assert all(bool((rolled[name] == skipped[name]).all()) for name in skipped)


def test_a_finished_run_that_is_started_again_is_left_alone(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    path = str(write_run(tiny_run, tmp_path / "run.yaml"))
    code, output = run([path], processes=2)
    assert code == 0, output
    before = tree(tmp_path / "run")
    code, output = run([path], processes=2)
    assert code == 0, output
    assert "is complete after 11 steps: nothing is left to do" in output
    assert tree(tmp_path / "run") == before
    # killed before its results were written
    (tmp_path / "run" / "summary.json").unlink()
    code, output = run([path], processes=2)
    assert code == 0, output
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["final"]
    earlier = json.loads(before["summary.json"])["final"]
    lost = ("memory/", "checkpoint/")
    kept = {key: value for key, value in earlier.items() if not key.startswith(lost)}
    assert {key: final.get(key) for key in kept} == kept


def test_a_foreign_export_directory_is_refused_before_training(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "run" / "hf").mkdir(parents=True)
    (tmp_path / "run" / "hf" / "notes.txt").write_text("mine")
    code, output = run([str(write_run(tiny_run, tmp_path / "run.yaml"))], processes=2)
    assert code == 2, output
    assert "is not an earlier export" in output
    assert not (tmp_path / "run" / "checkpoints").exists()
