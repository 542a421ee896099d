"""A run does not depend on how it is cut: tensor x data parallelism x ZeRO stage x method.

The yardstick is one process at stage 0, which other tests hold against plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_worker
from tests.distributed.tensor_worker import METHODS, STAGES

pytestmark = pytest.mark.distributed

_WORKER = "tests.distributed.tensor_worker"
_SLOW = pytest.mark.slow


@dataclass
class Run:
    """What a worker wrote."""

    figures: dict[str, Any]
    parameters: dict[str, dict[str, torch.Tensor]]


def start(world_size: int, directory: Path) -> Run:
    figures = run_worker(_WORKER, world_size, directory)
    return Run(figures, torch.load(directory / f"tensor_worker_{world_size}.pt"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start(1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start(4, tmp_path_factory.mktemp("four"))


def check(run: Run, one: Run, cell: str) -> None:
    method = cell.partition("/")[0]
    found, expected = run.figures[cell], one.figures[f"{method}/fold/0/tp1"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    for key in ("switched", "rank"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4)
    kinds = [(kind, fraction) for kind, fraction, _ in found["events"]]
    assert kinds == [(kind, pytest.approx(part)) for kind, part, _ in expected["events"]]
    assert all(drift < 1e-6 for _, _, drift in found["events"])
    for name, value in one.parameters[f"{method}/fold/0/tp1"].items():
        difference = (run.parameters[cell][name] - value).abs().max()
        assert difference <= 1e-6, name


TWO = [
    f"{method}/fold/{stage}/tp{size}" for size in (1, 2) for method in METHODS for stage in STAGES
]
PLANS = [
    f"{method}/act/{stage}/tp2" for method in ("lora", "relora", "switchlora") for stage in (0, 2)
]
FOUR = [f"{method}/fold/{stage}/tp2" for method in METHODS for stage in STAGES]


def test_the_runs_have_events(one: Run) -> None:
    assert len(one.figures["relora/fold/0/tp1"]["events"]) == 3
    assert one.figures["switchlora/fold/0/tp1"]["switched"] > 50


@pytest.mark.parametrize("cell", [*TWO, *PLANS])
def test_two_ranks(two: Run, one: Run, cell: str) -> None:
    check(two, one, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", FOUR)
def test_two_copies_of_two_ranks_each(four: Run, one: Run, cell: str) -> None:
    check(four, one, cell)


@pytest.mark.parametrize("cell", [cell for cell in (*TWO, *PLANS) if cell.endswith("tp2")])
def test_bytes_within_and_between_copies_equal_the_closed_forms(two: Run, cell: str) -> None:
    traffic = two.figures[cell]["traffic"]
    assert traffic["counted"] == traffic["expected"]


@pytest.mark.slow
@pytest.mark.parametrize("cell", [c for c in FOUR if c != "switchlora/fold/3/tp2"])
def test_bytes_of_two_copies_equal_the_closed_forms(four: Run, cell: str) -> None:
    # a switch before the step that is counted makes stage 3 gather more
    traffic = four.figures[cell]["traffic"]
    assert {kind[1] for kind in traffic["counted"]} == {"dp", "tp"}
    assert traffic["counted"] == traffic["expected"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("method", ["switchlora", "sltrain"])
def test_a_changed_bit_of_a_shared_factor_is_named(two: Run, method: str, stage: int) -> None:
    message = two.figures[f"{method}/fold/{stage}/tp2"]["desync"]
    assert "model.layers.1.mlp.up_proj.lora_A" in message
