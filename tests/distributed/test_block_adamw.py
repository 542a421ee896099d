"""Eight-bit moments at every stage: close to 32 bits, reset by vector, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import block_adamw
from tests.harness.build import STAGES
from tests.harness.ranks import run_ranks
from tests.harness.run import metrics, run, write_run
from tests.harness.runs import EVENTFUL

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return run_ranks(block_adamw.figures, 2)


@pytest.mark.parametrize(("method", "stage"), block_adamw.CELLS)
def test_training_follows_32_bit_moments(figures: dict[str, Any], method: str, stage: int) -> None:
    found = figures[f"{method}/{stage}"]
    assert found["losses"] == pytest.approx(found["plain"]["losses"], rel=1e-2)
    assert found["distance"] < 0.02
    states = found["measured"]["states"]
    assert states < found["plain"]["measured"]["states"]
    # every rank pads its slice, and these layers are small
    assert states == pytest.approx(found["expected"]["states"], rel=0.06)


@pytest.mark.parametrize("method", EVENTFUL)
def test_per_layer_updates_are_the_same_run(figures: dict[str, Any], method: str) -> None:
    stage = next(stage for name, stage in block_adamw.CELLS if name == method)
    found, plain = figures[f"{method}/per_layer"], figures[f"{method}/{stage}"]
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_restarts_reset_every_moment(figures: dict[str, Any], stage: int) -> None:
    assert figures[f"relora/{stage}"]["resets"] == [1.0, 1.0]


def test_resume_is_bit_exact(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    tiny_run["optimizer"]["name"] = "adamw8bit"
    tiny_run["method"]["reset"] = {"mode": "random", "fraction": 0.9}
    tiny_run["train"]["steps"] = 8
    tiny_run["output_dir"] = str(tmp_path / "whole")
    description = str(write_run(tiny_run, tmp_path / "run.yaml"))
    code, output = run([description], processes=2)
    assert code == 0, output
    expected = metrics(tmp_path / "whole")
    assert 0.8 < expected[6]["method/moments_reset_fraction"] < 1.0
    source = tmp_path / "whole" / "checkpoints" / "step_5"
    shard = next(source.glob("*optim_states.pt"))
    state = torch.load(shard, weights_only=False)["optimizer_state_dict"]
    kinds = {t.dtype for t in _tensors(state) if t.dtype != torch.float32}
    assert {torch.int8, torch.uint8} <= kinds
    resumed = tmp_path / "resumed"
    code, output = run(
        [description, f"output_dir={resumed}", f"checkpoint.resume={source}"], processes=2
    )
    assert code == 0, output
    for at, line in metrics(resumed).items():
        for figure in ("train/loss", "train/grad_norm", "eval/loss"):
            assert line.get(figure) == expected[at].get(figure), (at, figure)


def _tensors(node: Any) -> list[torch.Tensor]:
    if isinstance(node, torch.Tensor):
        return [node]
    items = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [found for item in items for found in _tensors(item)]
