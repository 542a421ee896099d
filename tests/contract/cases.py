"""Whole runs of a method that only the tests know, on live ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from relora_ds.checkpoint.export.hf import export_hf
from relora_ds.checkpoint.rewriting.reshape import reshape_checkpoint
from relora_ds.config.load import LoadedRun, load_run_config
from relora_ds.errors import CheckpointError
from relora_ds.parallel.topology import Topology
from relora_ds.train.evaluate_checkpoint import evaluate_checkpoint
from relora_ds.train.lifetime.lifetime import Lifetime
from relora_ds.train.run import run
from tests.contract.toy import OpaqueToy, toy

Run = tuple[str, list[str]]
"""Run file and overrides."""


def train(topology: Topology, runs: Sequence[Run]) -> list[dict[int, dict[str, Any]]]:
    """The training lines of several runs, one after the other, by step."""
    found = []
    with toy():
        for path, overrides in runs:
            loaded = load_run_config(path, overrides)
            _run(loaded)
            found.append(lines(Path(loaded.config.output_dir)))
    return found


def train_opaque(topology: Topology, path: str, overrides: list[str], data: str) -> dict[str, Any]:
    """A run of a method without dense weights: what it ended with, and what is made of it."""
    with toy(OpaqueToy):
        loaded = load_run_config(path, overrides)
        _run(loaded)
        output_dir = Path(loaded.config.output_dir)
        found: dict[str, Any] = {"score": evaluate_checkpoint(output_dir, data, None, 4)}
        try:
            export_hf(output_dir / "checkpoints", output_dir / "hf", torch.float32)
        except CheckpointError as error:
            found["refusal"] = str(error)
    found["summary"] = json.loads((output_dir / "summary.json").read_text())
    found["exported"] = (output_dir / "hf").exists()
    found["log"] = (output_dir / "logs" / "rank_0.log").read_text()
    return found


def _run(loaded: LoadedRun) -> None:
    lifetime = Lifetime()
    run(loaded, lifetime)
    lifetime.close()


def reshape(topology: Topology, source: str, target: str, **sizes: int) -> None:
    """Rewrite a checkpoint for other processes."""
    with toy() if topology.is_main else nullcontext():
        reshape_checkpoint(Path(source), Path(target), **sizes)


def lines(output_dir: Path) -> dict[int, dict[str, Any]]:
    """The training lines of metrics.jsonl by step."""
    found = [json.loads(line) for line in (output_dir / "metrics.jsonl").open()]
    return {line["step"]: line for line in found if "train/loss" in line}
