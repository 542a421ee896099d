"""Checkpoints that earlier versions wrote are exported, scored and rewritten as they were then.

`tests/golden/make_checkpoint.py` says how they came about; `tests/distributed` resumes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.checkpoint.export.hf import export_hf
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.upgrade import FORMAT, KEY
from relora_ds.checkpoint.rewriting.reshape import reshape_checkpoint
from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.config.sections import TrainConfig
from relora_ds.train import evaluate_checkpoint as scoring
from relora_ds.train.evaluate_checkpoint import evaluate_checkpoint
from tests.golden.make_checkpoint import VALID, checkpoint, expected, export_hash, machine

KNOWN = [("relora", 0), ("relora", 1), ("relora", 2), ("switchlora", 0)]
golden = pytest.mark.parametrize(("method", "number"), KNOWN)


def recorded(method: str) -> dict[str, Any]:
    return json.loads(expected(method).read_text())


def test_todays_format_is_among_them() -> None:
    assert ("relora", FORMAT) in KNOWN


@golden
def test_export(method: str, number: int, tmp_path: Path) -> None:
    before = recorded(method)
    export_hf(checkpoint(method, number), tmp_path / "hf", torch.float32)
    if machine() != before["machine"]:
        pytest.skip("recorded on another processor, where a product may end in other bits")
    assert export_hash(tmp_path / "hf") == before["export"]


@golden
def test_evaluation(method: str, number: int) -> None:
    before = recorded(method)
    found = evaluate_checkpoint(checkpoint(method, number), str(VALID), None, 8)
    assert found["tokens"] == before["evaluation"]["tokens"]
    if machine() == before["machine"]:
        assert found == before["evaluation"]
    assert found["loss"] == pytest.approx(before["evaluation"]["loss"], rel=1e-5)


def test_a_score_is_fp32_wherever_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a container has switched on; and never on the CPU of a machine with a GPU."""
    asked: list[str] = []

    def choose_kernels(train: TrainConfig) -> None:
        asked.append(f"tf32: {train.tf32}, deterministic: {train.deterministic}")

    monkeypatch.setattr(scoring, "check_accelerator", lambda: asked.append("machine"))
    monkeypatch.setattr(scoring, "set_arithmetic", choose_kernels)
    monkeypatch.setattr(scoring, "accelerator_type", lambda: asked.append("device") or "cpu")
    evaluate_checkpoint(checkpoint("relora", FORMAT), str(VALID), None, 8)
    assert asked == ["machine", "tf32: False, deterministic: True", "device"]


@golden
def test_rewriting(method: str, number: int, tmp_path: Path) -> None:
    """Values, clocks and the method's state pass unchanged into today's format."""
    source, target = checkpoint(method, number), tmp_path / "rewritten"
    reshape_checkpoint(source, target, dp_size=2, stage=3)
    assert json.loads((target / layout.TRAINER).read_text())[KEY] == FORMAT
    before, after = SavedRun(source), SavedRun(target)
    # earlier formats did not say how tensors of the method's state are sharded
    shards = after.record.trainer.method_shards
    assert shards is not None
    changes = {"dp_size": 2, "zero_stage": 3, "method_shards": shards}
    assert after.record.trainer == before.record.trainer.model_copy(update=changes)
    assert after.record.config == before.record.config
    _assert_equal(dict(before.state().tensors()), dict(after.state().tensors()))
    _assert_equal(before.state().clocks, after.state().clocks)
    _assert_equal(before.method_state(), after.method_state())
    _assert_equal(dict(DenseModel(source).weights()), dict(DenseModel(target).weights()))


def _assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        other = second[name]
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, name
