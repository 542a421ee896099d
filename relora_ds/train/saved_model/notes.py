"""Scores of a saved model in the summary of the run that it is of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from relora_ds.files.objects import read_object
from relora_ds.train.telemetry.atomic import write_atomically


def note_in_summary(path: Path, key: str, scores: Mapping[str, Any]) -> None:
    """Write scores into `summary.json`, beside earlier ones of other tasks; without one, nothing.

    Args:
        path: the model, which lies in the directory of its run.
        key: of the summary.
        scores: JSON values by task.
    """
    for summary in _summaries(path):
        content = read_object(summary)
        if content is not None:
            earlier = content.get(key)
            content[key] = (earlier if isinstance(earlier, dict) else {}) | dict(scores)
            write_atomically(summary, (json.dumps(content, indent=2) + "\n").encode())
            return


def _summaries(path: Path) -> Iterator[Path]:
    """Where the summary of a model's run may lie: it, `hf/` and `checkpoints/step_N` are in it."""
    place = path.resolve()
    for each in (place, *list(place.parents)[:2]):
        if (each / "summary.json").is_file() and (each / "metrics.jsonl").is_file():
            yield each / "summary.json"
