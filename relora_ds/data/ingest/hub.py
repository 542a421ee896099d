"""Data sets of Hugging Face's: saved to a disk, or streamed by name; needs the package datasets."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora_ds.data.formats import Faults, OnError, Piece, under, value_pieces, without_empty
from relora_ds.data.ingest.texts import Reader, Share
from relora_ds.data.token_files.metadata import SourceFile
from relora_ds.errors import DataError, ReloraError

_SAVED = ("dataset_info.json", "dataset_dict.json")  # one of them in what `save_to_disk` wrote
_SHARES_PER_WORKER = 8
_DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class DatasetShare:
    """Consecutive rows of a data set."""

    name: str
    """A folder that `save_to_disk` wrote, or what `load_dataset` takes."""
    config: str | None
    """Configuration of the data set, for one that has several."""
    split: str | None
    """Which split; None for the only one, or `train`."""
    text_key: str
    on_error: OnError
    first: int = 0
    """First row, from 0."""
    end: int | None = None
    """Row behind the last; None for all that come."""

    def __str__(self) -> str:
        rows = f", rows {self.first + 1} to {self.end}" if self.end is not None else ""
        return f"{self.name}{rows}"

    def open(self) -> Reader:
        """The reader of these rows.

        Raises:
            DataError: the data set cannot be opened, or has no such split or column.
        """
        rows = open_dataset(self)
        if self.end is not None:
            rows = rows.select(range(self.first, self.end))
        return _RowReader(rows, self)


class _RowReader:
    """Documents of a data set, one per row.

    Args:
        rows: what to read, an iterable of dictionaries.
        share: where it is of.

    Raises:
        DataError: there is no such column.
    """

    def __init__(self, rows: Any, share: DatasetShare) -> None:
        self.position = 0
        """Rows read so far."""
        self._faults = Faults(share.on_error)
        self._share = share
        key, names = share.text_key, rows.column_names  # None where only a row would tell
        column = key if names is None or key in names else key.partition(".")[0]
        if names is not None and column not in names:
            raise DataError(
                f"{share.name}: no column {key!r} among {sorted(names)}; name one as --text-key"
            )
        self._rows = rows if names is None else rows.select_columns([column])

    @property
    def skipped(self) -> dict[str, int]:
        """How many rows were left out so far, by reason."""
        return dict(sorted(self._faults.counts.items()))

    def pieces(self) -> Iterator[Piece]:
        """All pieces of all documents.

        Raises:
            DataError: a row cannot be used and is not to be skipped, or no more rows can be had.
        """
        yield from without_empty(self._documents(), self._faults)

    def _documents(self) -> Iterator[Piece]:
        name, key = self._share.name, self._share.text_key
        try:
            for row in self._rows:
                self.position += 1
                where = f"{name}:row {self._share.first + self.position}"
                try:
                    value = under(row, key)
                except KeyError as error:
                    self._faults.report("missing text key", where, str(error.args[0]))
                else:
                    yield from value_pieces(value, where, key, self._faults)
        except ReloraError:
            raise
        except Exception as error:  # of the network, of Arrow, of a decoder: nothing in common
            row = self._share.first + self.position + 1
            raise DataError(f"{name}:row {row}: cannot be read: {_first_line(error)}") from error


class HubTexts:
    """A data set as the documents of a token file.

    Args:
        name: a folder that `save_to_disk` wrote, or the name of a data set, which is streamed.
        config: configuration of a data set that has several.
        split: which split; None for the only one, or `train`.
        text_key: column of the text.
        on_error: "fail" stops at the first row that cannot be used; "skip" counts it and goes on.

    Raises:
        DataError: the package is missing, or the data set cannot be opened.
    """

    def __init__(
        self, name: str, config: str | None, split: str | None, text_key: str, on_error: OnError
    ) -> None:
        self._all = DatasetShare(name, config, split, text_key, on_error)
        self._rows = open_dataset(self._all)

    @property
    def total(self) -> int | None:
        """Rows, if the data set is on the disk."""
        return len(self._rows) if is_saved(self._all.name) else None

    def shares(self, workers: int) -> list[Share]:
        """Equal numbers of rows; a stream is one share, which one worker reads."""
        total, whole = self.total, self._all
        count = 1 if total is None or workers == 1 else min(total, workers * _SHARES_PER_WORKER)
        if total is None or count <= 1:
            return [whole]
        ends = [total * number // count for number in range(count + 1)]
        own = whole.name, whole.config, whole.split, whole.text_key, whole.on_error
        return [DatasetShare(*own, first, end) for first, end in itertools.pairwise(ends)]

    def sources(self) -> tuple[SourceFile, ...]:
        """The data set, and the bytes of its files; 0 for a stream."""
        share = self._all
        files = self._rows.cache_files if is_saved(share.name) else []
        size = sum(Path(file["filename"]).stat().st_size for file in files)
        parts = (share.name, share.config, share.split)
        return (SourceFile(path=":".join(part for part in parts if part), bytes=size),)


def open_dataset(share: DatasetShare) -> Any:
    """The rows of the data set that a share is of, all of them.

    Raises:
        DataError: the package is missing, or the data set cannot be opened, or has no such split.
    """
    try:
        package = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{share.name}: reading a data set needs the package datasets: pip install datasets"
        ) from error
    package.disable_progress_bars()
    try:
        if not is_saved(share.name):
            split = share.split or _DEFAULT_SPLIT
            return package.load_dataset(share.name, share.config, split=split, streaming=True)
        saved = package.load_from_disk(share.name)
    except Exception as error:  # nothing that the package raises has a base of its own
        raise DataError(
            f"{share.name}: cannot be opened as a data set: {_first_line(error)}; name a folder "
            "that save_to_disk wrote, or a data set of the Hugging Face hub with its --split and "
            "--dataset-config, or give files as --input"
        ) from error
    return _split_of(saved, share)


def _split_of(saved: Any, share: DatasetShare) -> Any:
    if not isinstance(saved, dict):
        if share.split not in (None, str(saved.split)):
            raise _no_split(share, [str(saved.split)] if saved.split else [])
        return saved
    names = sorted(saved)
    default = names[0] if len(names) == 1 else _DEFAULT_SPLIT
    if (share.split or default) not in saved:
        raise _no_split(share, names)
    return saved[share.split or default]


def _no_split(share: DatasetShare, names: list[str]) -> DataError:
    asked = share.split or _DEFAULT_SPLIT
    known = f"it has {', '.join(names)}" if names else "it has none: leave --split out"
    return DataError(f"{share.name}: no split {asked!r}; {known}")


def is_saved(name: str) -> bool:
    """Whether a folder is one that `save_to_disk` wrote."""
    return any(Path(name, file).is_file() for file in _SAVED)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
