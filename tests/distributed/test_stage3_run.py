"""A whole run at stage 3: warm start, merges, bit-exact resume and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relora_ds.checkpoint.export.dense import DenseModel
from tests.harness.run import metrics, run, write_run

pytestmark = pytest.mark.distributed

FIGURES = ("train/loss", "train/lr", "train/grad_norm", "eval/loss")


def check_same_but_ties(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Working weights are masters in bf16. What lies in the middle of two values, one weight in
    65 thousand, goes to the even one in training, and away from zero where the rest is kept."""
    pair = (each.bfloat16().view(torch.int16).int() for each in (found, expected))
    steps = torch.sub(*pair).abs()
    assert int(steps.max()) <= 1
    assert int(steps.count_nonzero()) <= 2


def test_stage_3_resumes_bit_exactly_and_exports(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 100, "reduce_bucket_size": 100_000}
    Path(tiny_run["deepspeed"]).write_text(json.dumps({"zero_optimization": zero}))
    tiny_run["train"]["precision"] = "bf16"
    description = str(write_run(tiny_run, tmp_path / "run.yaml"))
    output_dir = Path(tiny_run["output_dir"])
    code, output = run([description], processes=2)
    assert code == 0, output
    expected = metrics(output_dir)
    checkpoints = output_dir / "checkpoints"

    warm = dict(DenseModel(checkpoints / "step_3").weights())
    start = dict(DenseModel(checkpoints / "step_4").weights())
    for name, value in warm.items():
        check_same_but_ties(start[name], value)
    exported = load_file(output_dir / "hf" / "model.safetensors")
    for name, value in DenseModel(checkpoints / "step_11").weights().items():
        assert torch.equal(exported[name], value), name

    for step in (3, 5):
        resumed = tmp_path / f"from_{step}"
        source = checkpoints / f"step_{step}"
        code, output = run(
            [description, f"output_dir={resumed}", f"checkpoint.resume={source}"], processes=2
        )
        assert code == 0, output
        for at, line in metrics(resumed).items():
            assert [line.get(f) for f in FIGURES] == [expected[at].get(f) for f in FIGURES], at
        for rank in (0, 1):
            name = f"step_11/side_rank_{rank}.safetensors"
            sides = [load_file(d / name) for d in (checkpoints, resumed / "checkpoints")]
            assert all(torch.equal(value, sides[1][key]) for key, value in sides[0].items())
