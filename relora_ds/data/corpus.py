"""Raw corpora: files of text, JSON Lines or Parquet, read as one stream of documents."""

from __future__ import annotations

import contextlib
import glob
import lzma
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from relora_ds.data.formats import (
    Faults,
    OnError,
    Piece,
    read_jsonl,
    read_parquet,
    read_text,
    without_empty,
)
from relora_ds.errors import DataError

_COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_LINES = (".jsonl", ".json", ".ndjson")  # C4 and Dolma name theirs .json
_FORMATS = (".txt", *_LINES, ".parquet")
_KNOWN = ".txt, .jsonl or .json (all also with .gz, .zst, .bz2 or .xz) and .parquet"
_WILD = re.compile(r"[*?\[]")


class DocumentReader:
    """The documents of some files, one file after the other.

    Formats, by suffix in any case: `.txt` (a blank line ends a document), `.jsonl` and `.json` (one
    object per line), all also `.gz`, `.zst`, `.bz2` and `.xz`, and `.parquet`. A byte order mark is
    dropped, CRLF becomes LF, empty documents are dropped. Memory is bounded: a long document comes
    in several pieces.

    Args:
        inputs: files to read, in this order. A directory stands for all files of a known format in
            it and below, a pattern such as `c4/*.json.gz` for those that match; sorted by name.
        text_key: key (JSON) or column (Parquet) of the text; `meta.text` is one within another.
        on_error: "fail" stops at the first input that cannot be used; "skip" leaves it out (a line
            of text, a JSON record, a Parquet row, or the rest of a damaged file) and counts it.

    Raises:
        DataError: a file is missing, is not a file, or has an unknown suffix; or nothing matches.
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        text_key: str = "text",
        on_error: OnError = "fail",
    ) -> None:
        if not inputs:
            raise DataError("no input files: name at least one")
        self.paths = [file for path in inputs for file in _files(Path(path))]
        self.sizes = [path.stat().st_size for path in self.paths]
        """Bytes of each file."""
        self.documents = 0
        """Documents read so far."""
        self.position = 0
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
        yield from self.pieces()
        if not self.documents:
            raise no_documents([str(path) for path in self.paths], self.skipped)

    def pieces(self) -> Iterator[Piece]:
        """All pieces of all documents, of which there may be none. One pass, as above.

        Raises:
            DataError: an input cannot be used and `on_error` is "fail".
        """
        finished = 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            with self._open(path) as stream:
                for piece in without_empty(self._pieces(path, stream), self._faults):
                    self.position = finished + min(stream.tell(), size)
                    self.documents += piece.last
                    yield piece
            finished += size
            self.position = finished

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
        stream = raw if compression is None else _decompressed(raw, compression)
        if kind in _LINES:
            return read_jsonl(stream, str(path), self._text_key, self._faults)
        return read_text(stream, str(path), self._faults)


def no_documents(names: Sequence[str], skipped: Mapping[str, int]) -> DataError:
    """What is to be said of inputs without a document.

    Args:
        names: of the inputs.
        skipped: how many were left out, by reason.
    """
    left_out = f"; left out: {skipped}" if skipped else ""
    return DataError(f"no documents in {', '.join(names)}{left_out}")


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    if compression == "xz":
        return cast(BinaryIO, lzma.open(raw))
    # Arrow's decompressor reports a stream that ends early, which zstandard's does not
    return cast(BinaryIO, pa.CompressedInputStream(raw, compression))


def _format_of(path: Path) -> tuple[str, str | None]:
    """Suffix of the format and name of the compression."""
    *_, before, last = "", "", *(suffix.lower() for suffix in path.suffixes)
    compression = _COMPRESSION.get(last)
    return (before if compression else last), compression


def _is_known(path: Path) -> bool:
    kind, compression = _format_of(path)
    return kind in _FORMATS and not (compression and kind == ".parquet")


def _files(path: Path) -> list[Path]:
    """The files that an input stands for, each of a known format.

    Raises:
        DataError: there is none, or it is of no known format.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _is_known(file))
        if not found:
            raise DataError(f"{path}: no file of a known format in this directory: {_KNOWN}")
        return found
    if not path.exists() and _WILD.search(str(path)):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise DataError(f"{path}: no file matches; name existing text files")
        return [file for each in found for file in _files(each)]
    if not _is_known(path):
        suffix = "".join(path.suffixes[-2:]) or path.name
        raise DataError(f"{path}: unknown format {suffix!r}; known are {_KNOWN}")
    if not path.is_file():
        state = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{path}: {state}; name an existing text file")
    return [path]
