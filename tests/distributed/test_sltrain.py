"""SLTrain on one and two ranks at every stage equals dense autograd in plain PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relora_ds.methods.sltrain.support import draw_support
from tests.distributed.cases import sltrain
from tests.harness.build import STAGES
from tests.harness.ranks import run_ranks
from tests.harness.run import metrics, run, write_run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=[1, 2])
def figures(request: pytest.FixtureRequest) -> dict[str, Any]:
    return run_ranks(sltrain.figures, request.param)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("variant", sltrain.VARIANTS)
def test_losses_and_parameters_equal_dense_autograd(
    figures: dict[str, Any], variant: str, stage: int
) -> None:
    found = figures[f"{variant}/{stage}"]
    assert found["losses"] == pytest.approx(figures["reference"], rel=1e-5)
    if stage < 3:  # there no rank ever holds a whole parameter
        assert found["difference"] <= 1e-5
    assert found["support_kept"]


def test_bf16_follows_and_keeps_its_indices(figures: dict[str, Any]) -> None:
    for stage in STAGES:
        found = figures[f"bf16/{stage}"]
        assert found["kinds"] == ["torch.int16", "torch.int32"]
        assert found["losses"] == pytest.approx(figures["reference"], rel=2e-2)


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_is_bit_exact_and_the_export_is_dense(
    tiny_run: dict[str, Any], tmp_path: Path, stage: int
) -> None:
    zero = {"zero_optimization": {"stage": stage}}
    Path(tiny_run["deepspeed"]).write_text(json.dumps(zero))
    tiny_run["method"] = {"name": "sltrain", "rank": 4, "scale": 0.5, "sparsity": 0.1}
    tiny_run["train"]["steps"] = 4
    tiny_run["eval"]["every"] = 4
    tiny_run["output_dir"] = str(tmp_path / "whole")
    description = str(write_run(tiny_run, tmp_path / "run.yaml"))
    code, output = run([description], processes=2)
    assert code == 0, output
    checkpoints = tmp_path / "whole" / "checkpoints"
    resumed = tmp_path / "resumed"
    code, output = run(
        [description, f"output_dir={resumed}", f"checkpoint.resume={checkpoints / 'step_2'}"],
        processes=2,
    )
    assert code == 0, output
    expected = metrics(tmp_path / "whole")
    for at, line in metrics(resumed).items():
        for figure in ("train/loss", "train/grad_norm", "eval/loss"):
            assert line.get(figure) == expected[at].get(figure), (at, figure)
    first, second = (load_file(tmp_path / d / "hf/model.safetensors") for d in ("whole", "resumed"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert len([name for name in first if name.endswith("_proj.weight")]) == 14
    assert len(first) == 14 + 7
    if stage == 2:
        _assert_support_is_the_drawn_one(_module(checkpoints / "step_4"))


def _module(checkpoint: Path) -> dict[str, torch.Tensor]:
    path = checkpoint / "mp_rank_00_model_states.pt"
    return torch.load(path, map_location="cpu", weights_only=True)["module"]


def _assert_support_is_the_drawn_one(values: dict[str, torch.Tensor]) -> None:
    names = [key.removesuffix(".columns") for key in values if key.endswith(".columns")]
    assert len(names) == 14
    for name in names:
        rows = values[f"{name}.lora_B"].shape[0]
        cols = values[f"{name}.lora_A"].shape[1]
        count = int(rows * cols * 0.1)
        row_starts, columns = draw_support(42, name, rows, cols, count)
        assert torch.equal(values[f"{name}.row_starts"], row_starts)
        assert torch.equal(values[f"{name}.columns"], columns)
