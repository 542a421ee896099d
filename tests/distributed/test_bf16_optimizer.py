"""Gradients added up in fp32 at stage 1: another wrapper of DeepSpeed's, the same run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cases import bf16_optimizer
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("bf16_optimizer")
    return run_ranks(bf16_optimizer.figures, 2, directory=directory)


def test_the_public_interface_reads_what_was_written(figures: dict[str, Any]) -> None:
    assert figures["layout"]
    assert figures["wrong"] == []


def test_the_run_is_the_ordinary_one_up_to_the_rounding_of_sums(figures: dict[str, Any]) -> None:
    assert figures["losses"] != figures["ordinary"], "gradients were meant to be summed in fp32"
    assert figures["losses"] == pytest.approx(figures["ordinary"], rel=2e-3)


def test_a_resumed_run_is_bit_identical(figures: dict[str, Any]) -> None:
    assert figures["by_name"] == []
    assert figures["resumed"] == figures["losses"][bf16_optimizer.BREAK_AT :]
