"""A valid run in a temporary directory, for tests to break one line at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relora_ds.config.load import load_run_config
from relora_ds.errors import ConfigError

RUN = """\
output_dir: runs/test
model: {model}
deepspeed: {zero}
method:
  name: relora
  rank: 16
  alpha: 32
  merge_every: 100
  restart_warmup_steps: 10
  warm_start_steps: 50
  reset:
    mode: zero
data:
  train: data/train
  valid: data/valid
train:
  steps: 1000
  seq_length: 128
  micro_batch_size: 4
  global_batch_size: 16
  precision: bf16
optimizer:
  lr: 1e-3
  betas: [0.9, 0.999]
schedule:
  warmup_steps: 20
checkpoint:
  resume: auto
log:
  tensorboard: false
"""
MODEL = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


@pytest.fixture
def run_text(tmp_path: Path) -> str:
    """A valid run file whose model and ZeRO files exist."""
    (tmp_path / "model.json").write_text(json.dumps(MODEL, indent=2))
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    return RUN.format(model=tmp_path / "model.json", zero=tmp_path / "zero.json")


@pytest.fixture
def run_file(tmp_path: Path, run_text: str) -> Path:
    """`run_text` on disk."""
    path = tmp_path / "run.yaml"
    path.write_text(run_text)
    return path


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes the valid model with some keys changed; `None` stays null, `...` removes the key."""

    def write(**changes: Any) -> Path:
        merged = {**MODEL, **changes}
        path = tmp_path / "changed_model.json"
        kept = {key: value for key, value in merged.items() if value is not ...}
        path.write_text(json.dumps(kept, indent=2))
        return path

    return write


@pytest.fixture
def problems_of() -> Callable[..., list[str]]:
    """What loading `(path, *overrides)` reports; empty when it loads."""

    def report(path: Path, *overrides: str) -> list[str]:
        try:
            load_run_config(path, overrides)
        except ConfigError as error:
            return error.problems
        return []

    return report
