"""Where metrics go: the `Sink` protocol, and metrics.jsonl, the sink every run has."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from relora_ds.config.base import LARGEST
from relora_ds.errors import ConfigError, ReloraError
from relora_ds.files.regular import open_own, open_regular
from relora_ds.train.telemetry.atomic import write_atomically

Metric = float | int | str | None
"""One reported value; None means that it is not known."""

Metrics = Mapping[str, Metric]
"""Values of one step by name, such as ``train/loss``."""

Status = Literal["completed", "preempted", "diverged", "failed"]
"""How a run ended."""

_logger = logging.getLogger(__name__)


class Sink(Protocol):
    """A destination of metrics. Steps never decrease; one step may be logged more than once."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Record `metrics` of the optimizer step `step` (the number of completed updates)."""
        ...

    def close(self, status: Status = "completed") -> None:
        """Write out what is pending and release the destination. Further calls do nothing."""
        ...


def finite_or_none(value: Metric) -> Metric:
    """`value`, or None where it is NaN or infinite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """metrics.jsonl: one JSON object per line, ``step`` first, visible as soon as it is logged.

    The lines are strict JSON, which has no NaN and no infinity: both are written as null, so that
    every parser can read the file. A run that diverged says so in summary.json.

    A resumed run repeats the steps after its checkpoint. Their old lines are dropped first, so the
    file always holds one series; lines up to and including `resume_step` are kept byte for byte,
    but for what followed the report of that step: it happens after the checkpoint, and so again.

    Args:
        path: the file; its directory is created.
        resume_step: optimizer step of the checkpoint that the run continues from. 0 starts anew.

    Raises:
        ConfigError: the file cannot be read or written.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_after(path, resume_step)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}; choose an output_dir that can be written"
            ) from error

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps: the run goes back to a checkpoint of `step` updates.

        Raises:
            ReloraError: the file cannot be written.
        """
        try:
            self._file.close()
            self._file = _open_after(self._path, step)
        except OSError as error:
            raise self._unwritable(error) from error

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one line.

        Raises:
            ReloraError: the line could not be written, for example because the disk is full, or
                was written to a file that has been removed.
        """
        record = {"step": step} | {name: finite_or_none(value) for name, value in metrics.items()}
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            # The unwritten line stays in the buffer: closing would try, and fail, again.
            with contextlib.suppress(OSError):
                self._file.close()
            raise self._unwritable(error) from error
        self._check_place()

    def close(self, status: Status = "completed") -> None:
        """Close the file. `status` is not recorded here.

        Raises:
            ReloraError: the file is no longer where it was.
        """
        if self._file.closed:
            return
        try:
            self._check_place()
        finally:
            self._file.close()

    def _check_place(self) -> None:
        """A file that was removed takes up lines as if nothing had happened.

        Raises:
            ReloraError: another file, or none, has its name by now.
        """
        try:
            is_there = os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except OSError:
            is_there = False
        if not is_there:
            raise ReloraError(
                f"{self._path} was removed or replaced while the run was writing to it, and what "
                "the run wrote before may be lost with it; leave output_dir alone, and resume or "
                "start again"
            )

    def _unwritable(self, error: OSError) -> ReloraError:
        return ReloraError(
            f"cannot write {self._path}: {error.strerror}; free some space and resume"
        )


def _open_after(path: Path, resume_step: int) -> TextIO:
    """Open the file behind what an earlier part of the run is kept of."""
    if path.exists():
        _drop_after(path, resume_step)
    return open(path, "a", encoding="ascii", buffering=1, opener=open_own)


def _drop_after(path: Path, resume_step: int) -> None:
    """Remove what the checkpoint of a step does not know of, and unreadable lines."""
    kept, reported = [], False
    for line, record in _parse(path) if resume_step > 0 else ():
        if record is None or record["step"] > resume_step:
            continue
        if record["step"] < resume_step or not reported:
            kept.append(line)
        reported |= record["step"] == resume_step and "tokens" in record  # then the run saves
    write_atomically(path, b"".join(line + b"\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in file order; unreadable lines are warned about and skipped.

    Raises:
        OSError: the file cannot be read.
    """
    return [record for _, record in _parse(path) if record is not None]


def number_of(record: Mapping[str, Any], key: str) -> float:
    """A figure of a record; NaN where it reports none, or no number."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def last_figures(path: Path) -> dict[str, Any]:
    """The last known value of every figure that steps reported, as a summary holds them.

    Empty where there is no such file, or none that can be read.
    """
    figures: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        for record in read_metrics(path):
            if "tokens" in record:
                figures |= record
    return figures


def _parse(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line without its line end, and its record: None where it is not one.

    A process that is killed may leave its last line torn; anywhere else it means that the file was
    altered, which deserves a warning but not the loss of the run.
    """
    with open_regular(path) as file:
        lines = file.read().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _as_record(line)
        if record is None and number < len(lines):
            _logger.warning("%s:%d is not a metrics line and is skipped", path, number)
        yield line, record


def _as_record(line: bytes) -> dict[str, Any] | None:
    """What a line says, if it is such as `MetricsFile` writes: a step, and words, numbers or null.

    What other programs write for a number that is not finite becomes null.
    """
    try:
        record = json.loads(line, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    if not 0 <= record["step"] <= LARGEST:
        return None
    found = {name: finite_or_none(value) for name, value in record.items()}
    kinds = (str, bool, float, type(None))
    plain = all(isinstance(v, kinds) or _is_moderate(v) for v in found.values())
    return found if plain else None


def _is_moderate(value: object) -> bool:
    """Whether it is a whole number that a float holds."""
    return isinstance(value, int) and abs(value) < 1 << 1023
