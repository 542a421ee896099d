"""The runs that faults strike: every method that changes its own state, at a ZeRO stage each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import TinyCorpus
from tests.harness.descriptions import describe
from tests.harness.run import write_run

STEPS, SAVE_EVERY, EVALUATE_EVERY = 24, 4, 8
WARM_START, MERGES = 6, (12, 18)

_METHODS: dict[str, tuple[int, dict[str, Any]]] = {
    "relora": (2, {"rank": 4, "merge_every": 6, "restart_warmup_steps": 1, "warm_start_steps": 6}),
    "switchlora": (3, {"rank": 4, "interval": 4, "freeze_steps": 2, "descent_rate": 1.0}),
    "sltrain": (1, {"rank": 4, "scale": 1.0, "sparsity": 0.1}),
}
METHODS = tuple(_METHODS)


@dataclass(frozen=True)
class Run:
    """A run that can be started again and again.

    Args:
        description: its run file.
        output_dir: where its results are.
    """

    description: Path
    output_dir: Path

    def arguments(self, *overrides: str) -> list[str]:
        """Command line of `launch/pretrain.py`."""
        return [str(self.description), *overrides]


def write(
    method: str, corpus: TinyCorpus, directory: Path, **sections: Mapping[str, object]
) -> Run:
    """A run of 24 updates in bf16 that saves, evaluates and, by its method, merges or switches.

    Args:
        method: one of `METHODS`.
        corpus: what it trains on.
        directory: for its files.
        sections: changed keys by section.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stage, settings = _METHODS[method]
    own: dict[str, dict[str, object]] = {
        "train": {"steps": STEPS, "precision": "bf16"},
        "eval": {"every": EVALUATE_EVERY},
        "checkpoint": {"every": SAVE_EVERY, "keep": 2},
    }
    for section, values in sections.items():
        own[section] = {**own.get(section, {}), **values}
    run = describe(directory, {"name": method, **settings}, stage, corpus.files, **own)
    return Run(write_run(run, directory / "run.yaml"), directory / "run")
