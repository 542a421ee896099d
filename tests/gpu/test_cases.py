"""Every case of the report on this machine's GPU: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.case import Case
from benchmarks.gpu.cases.catalogue import cases_of
from benchmarks.gpu.processes import Running

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.mark.parametrize("case", cases_of("all", tiny=False), ids=lambda case: case.label)
def test_case(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # tests use CUDA in this process, so nothing that is forked from it could
    running = Running(case, "cuda", False, tmp_path, fork=False)
    outcome = None
    while outcome is None:
        time.sleep(0.1)
        outcome = running.ended(time.monotonic())
    if outcome.status == "SKIP":
        pytest.skip(outcome.message)
    assert outcome.status == "PASS", f"{outcome.message}\n{outcome.detail}"
