"""Raw corpora: files of text, JSON Lines or Parquet, read as one stream of documents."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from relora_ds.data.formats import Faults, OnError, Piece, read_jsonl, read_parquet, read_text
from relora_ds.errors import DataError

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_FORMATS = (".txt", ".jsonl", ".parquet")


class DocumentReader:
    """The documents of some files, one file after the other.

    Formats, by suffix: `.txt` (a blank line ends a document), `.jsonl` (one object per line), both
    also `.gz` and `.zst`, and `.parquet`. A byte order mark is dropped, CRLF becomes LF, empty
    documents are dropped. Memory is bounded: a long document comes in several pieces.

    Args:
        inputs: files to read, in this order.
        text_key: key (JSON) or column (Parquet) of the text.
        on_error: "fail" stops at the first input that cannot be used; "skip" leaves it out (a line
            of text, a JSON record, a Parquet row, or the rest of a damaged file) and counts it.

    Raises:
        DataError: a file is missing, is not a file, or has an unknown suffix.
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        text_key: str = "text",
        on_error: OnError = "fail",
    ) -> None:
        if not inputs:
            raise DataError("no input files: name at least one")
        self.paths = [Path(path) for path in inputs]
        for path in self.paths:
            _check_input(path)
        self.sizes = [path.stat().st_size for path in self.paths]
        """Bytes of each file."""
        self.documents = 0
        """Documents read so far."""
        self.bytes_read = 0
        """Bytes of the files consumed so far, out of `sum(sizes)`."""
        self._text_key = text_key
        self._faults = Faults(on_error)

    @property
    def skipped(self) -> dict[str, int]:
        """How many inputs were left out so far, by reason."""
        return dict(sorted(self._faults.counts.items()))

    def __iter__(self) -> Iterator[Piece]:
        """All pieces of all documents. One pass: counts go on from there.

        Raises:
            DataError: an input cannot be used and `on_error` is "fail", or there is no document at
                all.
        """
        finished = 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            with self._open(path) as stream:
                for piece in self._without_empty(self._pieces(path, stream)):
                    self.bytes_read = finished + min(stream.tell(), size)
                    yield piece
            finished += size
            self.bytes_read = finished
        if not self.documents:
            names = ", ".join(str(path) for path in self.paths)
            skipped = f"; left out: {self.skipped}" if self.skipped else ""
            raise DataError(f"no documents in {names}{skipped}")

    @contextlib.contextmanager
    def _open(self, path: Path) -> Iterator[BinaryIO]:
        """The raw file, closed at the end; its position tells the progress."""
        try:
            stream = path.open("rb")
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        with stream:
            yield stream

    def _pieces(self, path: Path, raw: BinaryIO) -> Iterator[Piece]:
        kind, compression = _format_of(path)
        if kind == ".parquet":
            return read_parquet(raw, str(path), self._text_key, self._faults)
        # Arrow's decompressor reports a stream that ends early, which zstandard's does not
        stream = cast(BinaryIO, pa.CompressedInputStream(raw, compression)) if compression else raw
        if kind == ".jsonl":
            return read_jsonl(stream, str(path), self._text_key, self._faults)
        return read_text(stream, str(path), self._faults)

    def _without_empty(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if piece.first and piece.last and not piece.text.strip():
                self._faults.counts["empty document"] += 1
                continue
            self.documents += piece.last
            yield piece


def _format_of(path: Path) -> tuple[str, str | None]:
    """Suffix of the format and name of the compression."""
    compression = _COMPRESSION.get(path.suffix)
    return (path.with_suffix("").suffix if compression else path.suffix), compression


def _check_input(path: Path) -> None:
    kind, compression = _format_of(path)
    if kind not in _FORMATS or (compression and kind == ".parquet"):
        known = ".txt, .jsonl (also with .gz or .zst) and .parquet"
        raise DataError(f"{path}: unknown format {path.suffix!r}; known are {known}")
    if not path.is_file():
        state = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{path}: {state}; name an existing text file")
