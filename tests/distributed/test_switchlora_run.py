"""SwitchLoRA through the command line: warm start, switches, resume, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.checkpoint.format.record import read_record
from tests.harness.run import metrics, run, write_run

pytestmark = pytest.mark.distributed

FIGURES = ("train/loss", "train/grad_norm", "eval/loss", "method/switched_vectors")
LAST, RESUMED = 10, 7


def test_a_resumed_run_is_bit_identical_with_frozen_vectors_pending(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    tiny_run["method"] = {
        "name": "switchlora",
        "rank": 4,
        "interval": 10,
        "descent_rate": 1.0,
        "warm_start_steps": 2,
    }
    tiny_run["train"] |= {"steps": LAST, "precision": "bf16"}
    tiny_run["schedule"]["warmup_steps"] = 1
    description = str(write_run(tiny_run, tmp_path / "run.yaml"))
    code, output = run([description], processes=2)
    assert code == 0, output
    checkpoints = tmp_path / "run" / "checkpoints"
    expected, again = metrics(tmp_path / "run"), tmp_path / "again"
    assert expected[LAST]["method/switched_vectors"] > 10
    assert expected[LAST]["method/host_bytes_per_node"] > 0
    drifts = [line[key] for line in expected.values() for key in line if key.endswith("_drift")]
    assert drifts
    assert max(drifts) <= 1e-6

    source = checkpoints / f"step_{RESUMED}"
    clocks = load_file(source / "side.safetensors")
    phase = read_record(source).trainer.step - 2
    assert any((t > phase).any() for name, t in clocks.items() if name.endswith("thaw"))
    code, output = run(
        [description, f"output_dir={again}", f"checkpoint.resume={source}"], processes=2
    )
    assert code == 0, output
    found = metrics(again)
    for at, line in found.items():
        for figure in FIGURES:
            assert line.get(figure) == expected[at].get(figure), (at, figure)
    for name in ("side.safetensors", "method.safetensors"):
        ours, theirs = (
            load_file(directory / f"step_{LAST}" / name)
            for directory in (checkpoints, again / "checkpoints")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    weights = dict(DenseModel(checkpoints / f"step_{LAST}").weights())
    resumed = dict(DenseModel(again / "checkpoints" / f"step_{LAST}").weights())
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())


def test_a_lost_bit_ends_the_run_at_the_next_logged_switch(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    """Logged steps are 4, 8 and 10; the fault happens after 5, and no periodic check is due."""
    tiny_run["method"] = {"name": "switchlora", "rank": 4, "interval": 10, "descent_rate": 1.0}
    tiny_run["train"] |= {"steps": LAST, "digest_every": 0}
    tiny_run["log"]["every"], tiny_run["eval"]["every"] = 4, 0
    tiny_run["checkpoint"]["every"] = 100
    description = str(write_run(tiny_run, tmp_path / "run.yaml"))
    script = "tests/distributed/pretrain_with_fault.py"
    code, output = run([description], processes=2, script=script)
    assert code == 6, output
    assert "disagrees with the others on model.layers.1.mlp.down_proj.weight" in output
    assert "after a switch" in output
    assert list(metrics(tmp_path / "run")) == [4]
