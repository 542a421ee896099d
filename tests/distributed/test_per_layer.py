"""Updates within the backward pass: the ordinary update, with one gradient at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import per_layer
from tests.harness.ranks import run_ranks
from tests.harness.run import metrics, run, write_run
from tests.harness.runs import EVENTFUL

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return run_ranks(per_layer.figures, 2)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("method", EVENTFUL)
def test_it_equals_the_ordinary_update(
    figures: dict[str, Any], method: str, accumulation: int
) -> None:
    found = figures[f"{method}/fp32/{accumulation}/0"]
    assert found["difference"] <= 1e-6
    assert found["replicas"] == 0.0
    assert found["losses"] == pytest.approx(found["plain"]["losses"], rel=1e-6)
    assert found["norms"] == pytest.approx(found["plain"]["norms"], rel=1e-5)
    assert found["gradients_left"] == 0


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("method", EVENTFUL)
def test_bf16_has_masters(figures: dict[str, Any], method: str, accumulation: int) -> None:
    found = figures[f"{method}/bf16/{accumulation}/0"]
    assert found["losses"] == pytest.approx(found["plain"]["losses"], rel=2e-3)
    assert found["replicas"] == 0.0
    assert found["measured"]["states"] == pytest.approx(found["plain"]["measured"]["states"])


@pytest.mark.parametrize("method", EVENTFUL)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_gradient_at_a_time(figures: dict[str, Any], method: str, precision: str) -> None:
    found = figures[f"{method}/{precision}/1/0"]
    alive = found["measured"]["gradients"]
    assert alive == found["expected"]["gradients"]
    assert alive < 0.35 * found["plain"]["measured"]["gradients"]
    kept = figures[f"{method}/{precision}/4/0"]["measured"]["gradients"]
    assert kept <= figures[f"{method}/{precision}/4/0"]["expected"]["gradients"]


@pytest.fixture(scope="module")
def pairs() -> dict[str, Any]:
    return run_ranks(per_layer.pairs, 2)


@pytest.mark.parametrize("method", ["relora", "switchlora"])
def test_a_pair_is_updated_when_both_gradients_are_there(
    pairs: dict[str, Any], method: str
) -> None:
    found = pairs[f"{method}/fp32"]
    assert found["difference"] <= 1e-6
    assert found["replicas"] == 0.0
    assert found["losses"] == pytest.approx(found["plain"]["losses"], rel=1e-6)
    rounded = pairs[f"{method}/bf16"]
    assert rounded["losses"] == pytest.approx(rounded["plain"]["losses"], rel=2e-3)
    assert rounded["replicas"] == 0.0
    for each in (found, rounded):
        assert each["measured"]["gradients"] == each["expected"]["gradients"]
        assert each["measured"]["states"] == pytest.approx(each["plain"]["measured"]["states"])
        assert each["gradients_left"] == 0


@pytest.mark.parametrize("accumulation", [1, 4])
def test_vectors_are_switched_and_frozen(figures: dict[str, Any], accumulation: int) -> None:
    found = figures[f"switchlora/fp32/{accumulation}/0"]
    assert found["frozen"] == found["plain"]["frozen"] > 50


def test_clipping_is_per_parameter(figures: dict[str, Any]) -> None:
    clipped = figures["sltrain/fp32/1/0.05"]
    # the logged norm is the global one before clipping, from the same first weights
    assert clipped["norms"][0] == pytest.approx(figures["sltrain/fp32/1/0"]["norms"][0], rel=1e-5)
    assert clipped["norms"][0] > 0.05
    assert clipped["losses"][-1] != figures["sltrain/fp32/1/0"]["losses"][-1]
    # Adam hardly minds the scale of gradients: both rules train alike
    assert clipped["losses"] == pytest.approx(clipped["plain"]["losses"], rel=0.05)


@pytest.mark.parametrize("masters", [True, False])
def test_resume_is_bit_exact(masters: bool, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    tiny_run["train"] |= {"per_layer_update": True, "steps": 8, "precision": "bf16"}
    tiny_run["train"]["master_weights"] = masters
    tiny_run["optimizer"]["clip"] = 0.5
    tiny_run["output_dir"] = str(tmp_path / "whole")
    Path(tiny_run["deepspeed"]).write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    description = str(write_run(tiny_run, tmp_path / "run.yaml"))
    code, output = run([description], processes=2)
    assert code == 0, output
    expected = metrics(tmp_path / "whole")
    assert [s for s, line in expected.items() if line.get("method/event") == "merge"] == [6]
    source = tmp_path / "whole" / "checkpoints" / "step_5"
    resumed = tmp_path / "resumed"
    code, output = run(
        [description, f"output_dir={resumed}", f"checkpoint.resume={source}"], processes=2
    )
    assert code == 0, output
    for at, line in metrics(resumed).items():
        for figure in ("train/loss", "train/grad_norm", "eval/loss"):
            assert line.get(figure) == expected[at].get(figure), (at, figure)
    assert (resumed / "hf" / "model.safetensors").is_file()
    alone = tmp_path / "alone"
    code, output = run([description, f"output_dir={alone}", f"checkpoint.resume={source}"])
    assert code == 0, output
    for at, line in metrics(alone).items():
        assert line["train/loss"] == pytest.approx(expected[at]["train/loss"], rel=1e-2)
    final = json.loads((resumed / "summary.json").read_text())["final"]
    for kind in ("measured", "expected"):
        assert final[f"memory/{kind}/gradients_bytes"] > 0
