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
from tests.distributed.tensor_worker import (
    ACT,
    ACT_STAGE,
    AT_SOME,
    EVERYWHERE,
    SOME_STAGES,
    STAGES,
)

pytestmark = pytest.mark.distributed

_TENSOR, _COPIES = "tensor_worker", "copies_worker"


@dataclass
class Run:
    """What a worker wrote."""

    figures: dict[str, Any]
    parameters: dict[str, dict[str, torch.Tensor]]


def start(worker: str, world_size: int, directory: Path) -> Run:
    figures = run_worker(f"tests.distributed.{worker}", world_size, directory)
    return Run(figures, torch.load(directory / f"{worker}_{world_size}.pt"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start(_TENSOR, 1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start(_TENSOR, 2, tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start(_COPIES, 2, tmp_path_factory.mktemp("copies"))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start(_TENSOR, 4, tmp_path_factory.mktemp("both"))


def check(run: Run, one: Run, cell: str) -> None:
    reference = f"{cell.partition('/')[0]}/fold/0"
    found, expected = run.figures[cell], one.figures[reference]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=3e-6)
    for key in ("switched", "rank"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4)
    kinds = [(kind, fraction) for kind, fraction, _ in found["events"]]
    assert kinds == [(kind, pytest.approx(part)) for kind, part, _ in expected["events"]]
    assert all(drift < 1e-6 for _, _, drift in found["events"])
    for name, value in one.parameters[reference].items():
        difference = (run.parameters[cell][name] - value).abs().max()
        assert difference <= 1e-6, name


ALL = [f"{method}/fold/{stage}" for method in EVERYWHERE for stage in STAGES]
SHARED = [
    *ALL,
    *(f"{method}/fold/{stage}" for method in AT_SOME for stage in SOME_STAGES),
    *(f"{method}/act/{ACT_STAGE}" for method in ACT),
]


def test_the_runs_have_events(one: Run) -> None:
    assert len(one.figures["relora/fold/0"]["events"]) == 3
    assert one.figures["switchlora/fold/0"]["switched"] > 50


@pytest.mark.parametrize("cell", SHARED)
def test_one_copy_on_two_ranks(shared: Run, one: Run, cell: str) -> None:
    check(shared, one, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ALL)
def test_two_copies_on_two_ranks(copies: Run, one: Run, cell: str) -> None:
    check(copies, one, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ALL)
def test_two_copies_on_two_ranks_each(both: Run, one: Run, cell: str) -> None:
    check(both, one, cell)


@pytest.mark.parametrize("cell", SHARED)
def test_bytes_within_and_between_copies_equal_the_closed_forms(shared: Run, cell: str) -> None:
    traffic = shared.figures[cell]["traffic"]
    assert traffic["counted"] == traffic["expected"]


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in ALL if cell != "switchlora/fold/3"])
def test_bytes_of_two_copies_equal_the_closed_forms(both: Run, cell: str) -> None:
    # a switch before the step that is counted makes stage 3 gather more
    traffic = both.figures[cell]["traffic"]
    assert {kind[1] for kind in traffic["counted"]} == {"dp", "tp"}
    assert traffic["counted"] == traffic["expected"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("method", ["switchlora", "sltrain"])
def test_a_changed_bit_of_a_shared_factor_is_named(shared: Run, method: str, stage: int) -> None:
    message = shared.figures[f"{method}/fold/{stage}"]["desync"]
    assert "model.layers.1.mlp.up_proj.lora_A" in message
