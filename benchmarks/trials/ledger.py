"""What finished runs of a court found: one line of JSON each, on disk before anybody reads it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from relora_ds.errors import ConfigError

_logger = logging.getLogger(__name__)


class Trial(NamedTuple):
    """One run of a contestant."""

    contestant: str
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.contestant}, rate {self.rate:g}, seed {self.seed}"

    @property
    def place(self) -> Path:
        """Its directory, below that of all runs."""
        return Path(self.contestant) / f"rate_{self.rate:g}_seed_{self.seed}"


@dataclass(frozen=True)
class Record:
    """What a finished run found.

    Args:
        contestant: its name.
        rate: its tuned learning rate.
        seed: its seed.
        setting: identifies the description that it was run with.
        perplexity: on validation data at the end; None if it diverged.
        cpu_seconds: processor time of all its processes; None if it is not known.
        wall_seconds: elapsed time, waiting for a processor included.
        curve: (update, validation perplexity) of every evaluation.
        effective_rank: exp of the entropy of a projection's singular values over their sum, as a
            share of its smaller side; a mean over projections.
        spectrum: singular values at equal distances over their largest; means over projections.
        versions: of this program and torch.
    """

    contestant: str
    rate: float
    seed: int
    setting: str
    perplexity: float | None
    cpu_seconds: float | None = None
    wall_seconds: float | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    effective_rank: float | None = None
    spectrum: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def trial(self) -> Trial:
        """The run."""
        return Trial(self.contestant, self.rate, self.seed)


class Ledger:
    """Records of a court, in a file that lines are added to.

    Args:
        path: the file; there may be none yet.
        settings: of the contestants. Records of other settings are left out.
    """

    def __init__(self, path: Path, settings: dict[str, str]) -> None:
        self._path, self._settings = path, settings
        self.records: dict[Trial, Record] = {}
        """Those that count, in order."""
        others = 0
        for record in _read(path):
            if settings.get(record.contestant) == record.setting:
                self.records[record.trial] = record
            else:
                others += record.contestant in settings
        if others:
            _logger.warning("%d records in %s were made with other settings", others, path)

    def add(self, record: Record) -> None:
        """Write a record; it is on disk when this returns."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a machine stopped in the middle of a line
                    file.write(b"\n")
            file.write((json.dumps(asdict(record)) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self.records[record.trial] = record

    def perplexity(self, trial: Trial) -> float | None:
        """What a finished run ended with: infinity if it diverged, None if it is not finished."""
        if (record := self.records.get(trial)) is None:
            return None
        return float("inf") if record.perplexity is None else record.perplexity


def _read(path: Path) -> Iterator[Record]:
    known = {each.name for each in fields(Record)}
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
            yield Record(**{name: value for name, value in found.items() if name in known})
        except (ValueError, AttributeError, TypeError):
            _logger.warning("%s:%d is no record and is skipped", path, number)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Inside, no other court works in a directory.

    Raises:
        ConfigError: another one does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another court is working in {directory}: wait for it, or give --output"
            ) from None
        yield
