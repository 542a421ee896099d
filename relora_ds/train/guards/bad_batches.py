"""logs/bad_batches.jsonl: which sequences a run did not believe, to look for the cause."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from relora_ds.data.batches import TrainingBatches
from relora_ds.files.objects import parse_object
from relora_ds.files.regular import open_regular
from relora_ds.train.telemetry.atomic import write_atomically

_logger = logging.getLogger(__name__)


class BadBatches:
    """Keeps one line per batch: a run that comes to one again writes its last verdict.

    Args:
        path: the file; lines of an earlier start of the run stay.
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
            kept = [known for known in self._lines() if known["step"] != step + 1]
            text = "".join(json.dumps(each) + "\n" for each in (*kept, line))
            write_atomically(self._path, text.encode())
        except OSError as error:
            _logger.warning("cannot write %s: %s", self._path, error.strerror)

    def _lines(self) -> list[dict[str, Any]]:
        """What the file holds; a line that is not one of ours is left out."""
        if not self._path.is_file():
            return []
        with open_regular(self._path) as lines:
            found = [*map(parse_object, lines)]
        return [line for line in found if line is not None and "step" in line]
