"""Values that are not finite, in what a run starts from or a checkpoint is rewritten from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from relora_ds.checkpoint.export.dense import DenseModel, FiniteWeights
from relora_ds.checkpoint.export.hf import export_hf
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import write_manifest
from relora_ds.checkpoint.format.record import read_record
from relora_ds.checkpoint.format.tensors import write_tensors
from relora_ds.checkpoint.rewriting.reshape import reshape_checkpoint
from relora_ds.errors import CheckpointError
from tests.unit.checkpoint.conftest import Saved

PROJECTION = "model.layers.0.self_attn.q_proj"
KINDS = {
    f"frozen.{PROJECTION}.weight": f"{PROJECTION}.weight",
    f"master.{PROJECTION}.lora_A": f"{PROJECTION}.weight",
    "master.model.norm.weight": "model.norm.weight",
}
"""Entries of a rewritten checkpoint, and the dense weights that they become part of."""


@pytest.fixture
def rewritten(saved: Saved, tmp_path: Path) -> Saved:
    """A checkpoint whose values are kept by name."""
    reshape_checkpoint(saved.path, tmp_path / "rewritten")
    return Saved(tmp_path / "rewritten")


def poison(saved: Saved, key: str, value: float) -> None:
    path = saved.path / layout.state(0)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not a view of it
    tensors[key].view(-1)[3] = value
    write_tensors(tensors, path, read_record(saved.path).origin)
    write_manifest(saved.path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", KINDS)
def test_a_dense_weight_is_named_as_it_is_read(rewritten: Saved, key: str, value: float) -> None:
    poison(rewritten, key, value)
    weights = FiniteWeights(DenseModel(rewritten.path).weights(), rewritten.path)
    broken = KINDS[key]
    with pytest.raises(CheckpointError, match=f"{broken} holds values that are not finite"):
        weights[broken]
    for name in weights:
        assert name == broken or bool(torch.isfinite(weights[name]).all())


def test_asking_for_a_name_reads_nothing(rewritten: Saved) -> None:
    poison(rewritten, "master.model.norm.weight", math.nan)
    weights = FiniteWeights(DenseModel(rewritten.path).weights(), rewritten.path)
    assert "model.norm.weight" in weights
    assert "model.another.weight" not in weights


@pytest.mark.parametrize("key", [*KINDS, f"exp_avg.{PROJECTION}.lora_B"])
def test_a_checkpoint_is_not_rewritten(rewritten: Saved, key: str, tmp_path: Path) -> None:
    poison(rewritten, key, math.nan)
    target = tmp_path / "again"
    with pytest.raises(CheckpointError, match=f"{key} holds values that are not finite"):
        reshape_checkpoint(rewritten.path, target, dp_size=2)
    assert not target.exists()


def test_a_checkpoint_is_not_exported(rewritten: Saved, tmp_path: Path) -> None:
    poison(rewritten, f"frozen.{PROJECTION}.weight", math.inf)
    with pytest.raises(CheckpointError, match=f"{PROJECTION}.weight holds values"):
        export_hf(rewritten.path, tmp_path / "hf", torch.float32)
    assert not (tmp_path / "hf").exists()
