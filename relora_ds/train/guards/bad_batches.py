"""logs/bad_batches.jsonl: which sequences a run did not believe, to look for the cause."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from relora_ds.data.batches import TrainingBatches

_logger = logging.getLogger(__name__)


class BadBatches:
    """Appends one line per batch.

    Args:
        path: the file.
        data: knows which sequences a step reads.
        is_main: whether this process writes; exactly one does.
    """

    def __init__(self, path: Path, data: TrainingBatches, is_main: bool) -> None:
        self._path, self._data, self._is_main = path, data, is_main

    def note(self, step: int, action: str, reason: str) -> None:
        """Write down the batch of a step, from 0, for every data-parallel rank.

        A file that cannot be written is warned about: the decision stands without it.
        """
        if not self._is_main:
            return
        line: dict[str, Any] = {"step": step + 1, "action": action, "reason": reason}
        line["ranks"] = [
            {"dp_rank": rank, "sequences": [[self._data.name(f), int(s)] for f, s in rows]}
            for rank, rows in enumerate(self._data.samples(step))
        ]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            _logger.warning("cannot write %s: %s", self._path, error.strerror)
