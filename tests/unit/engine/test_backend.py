"""Which wrapper drives a model, and what is said of a slow one."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from torch import nn

from relora_ds.engine import backend
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.optim.vector_adamw import VectorAdamW
from relora_ds.parallel.tensor import SINGLE
from tests.harness.build import run_config


@pytest.mark.parametrize(
    ("device", "stage", "precision", "warned"),
    [
        ("cuda", 0, "bf16", True),
        ("cuda", 1, "bf16", False),
        ("cuda", 0, "fp32", False),
        ("cpu", 0, "bf16", False),
    ],
)
def test_bf16_at_stage_0_on_a_gpu_is_warned_of(
    device: str,
    stage: int,
    precision: str,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(backend, "DeepSpeedBackend", lambda *given: started.append(given))
    monkeypatch.setattr(backend, "accelerator_type", lambda: device)
    config = run_config({"name": "full"}, train={"precision": precision})
    zero = resolve_deepspeed_config({"zero_optimization": {"stage": stage}}, config, 1)
    model = nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING):
        backend.start_backend(model, VectorAdamW(model.parameters()), config, zero, SINGLE)
    assert len(started) == 1
    assert ("take stage 1" in caplog.text) == warned
