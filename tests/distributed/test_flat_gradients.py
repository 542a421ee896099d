"""Gradients in flat tensors of their own are those that DeepSpeed would have updated with."""

from __future__ import annotations

import pytest
import torch

from relora_ds.engine.deepspeed.flat_gradients import flat_norm
from tests.distributed.cases import flat_gradients as cases
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _same(found: dict[str, list[list[tuple[float, float]]]]) -> None:
    for name, (flat, plain) in found.items():
        assert [loss for loss, _ in flat] == [loss for loss, _ in plain], name
        # DeepSpeed adds up squares in fp64
        norms = [norm for _, norm in plain]
        assert [norm for _, norm in flat] == pytest.approx(norms, rel=2e-6), name


def test_one_process() -> None:
    cells = [(1, "fp32", "one bucket"), (2, "fp32", "one bucket"), (2, "bf16", "one bucket")]
    _same(run_ranks(cases.updates, 1, cells=cells))


def test_two_processes() -> None:
    cells = [(1, "fp32", options) for options in cases.OPTIONS] + [(1, "bf16", "many buckets")]
    _same(run_ranks(cases.updates, 2, cells=cells))


def test_two_processes_that_share_a_model() -> None:
    """What both hold alike counts once in the norm."""
    _same(run_ranks(cases.updates, 2, cells=[(1, "fp32", "one bucket")], tensor=2))


@pytest.mark.parametrize("elements", [0, 1, 1023, 1024, 3_000_001])
def test_a_norm_of_many_elements_is_exact(elements: int) -> None:
    flat = torch.rand(elements)
    assert flat_norm(flat).item() == pytest.approx(flat.double().norm().item(), rel=1e-6)
