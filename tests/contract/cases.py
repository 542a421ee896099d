"""Whole runs of a method that only the tests know, on live ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from relora_ds.checkpoint.reshape import reshape_checkpoint
from relora_ds.config.load import load_run_config
from relora_ds.parallel.topology import Topology
from relora_ds.train.run import run
from tests.contract.toy import toy

Run = tuple[str, list[str]]
"""Run file and overrides."""


def train(topology: Topology, runs: Sequence[Run]) -> list[dict[int, dict[str, Any]]]:
    """The training lines of several runs, one after the other, by step."""
    found = []
    with toy():
        for path, overrides in runs:
            loaded = load_run_config(path, overrides)
            run(loaded)
            found.append(lines(Path(loaded.config.output_dir)))
    return found


def reshape(topology: Topology, source: str, target: str, **sizes: int) -> None:
    """Rewrite a checkpoint for other processes."""
    with toy() if topology.is_main else nullcontext():
        reshape_checkpoint(Path(source), Path(target), **sizes)


def lines(output_dir: Path) -> dict[int, dict[str, Any]]:
    """The training lines of metrics.jsonl by step."""
    found = [json.loads(line) for line in (output_dir / "metrics.jsonl").open()]
    return {line["step"]: line for line in found if "train/loss" in line}
