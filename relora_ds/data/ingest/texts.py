"""What a token file is made of, in shares for workers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from relora_ds.data.corpus import DocumentReader
from relora_ds.data.formats import OnError, Piece
from relora_ds.data.token_files.metadata import SourceFile

_SHARE_BYTES = 1 << 20  # smaller files are read by one worker together
_SHARES_PER_WORKER = 8  # so that all workers end at about the same time


class Reader(Protocol):
    """Documents in pieces, read once."""

    @property
    def position(self) -> int:
        """How much was read so far, in the unit of the whole."""
        ...

    @property
    def skipped(self) -> dict[str, int]:
        """How many inputs were left out so far, by reason."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """All pieces of all documents; there may be none.

        Raises:
            DataError: an input cannot be used.
        """
        ...


class Share(Protocol):
    """What one worker reads at once; can be sent to another process."""

    def __str__(self) -> str:
        """What it is, for messages."""
        ...

    def open(self) -> Reader:
        """The reader of its documents.

        Raises:
            DataError: it cannot be read.
        """
        ...


class Texts(Protocol):
    """Documents that make one token file."""

    @property
    def total(self) -> int | None:
        """How much there is to read, in bytes or rows; None where nobody knows."""
        ...

    def shares(self, workers: int) -> Sequence[Share]:
        """Consecutive shares for so many workers, which together are everything.

        Raises:
            DataError: nothing can be read.
        """
        ...

    def sources(self) -> tuple[SourceFile, ...]:
        """What the documents came from, known at the end."""
        ...


@dataclass(frozen=True)
class FileShare:
    """Some text files."""

    paths: tuple[Path, ...]
    text_key: str
    on_error: OnError

    def __str__(self) -> str:
        return str(self.paths[0])

    def open(self) -> Reader:
        """The reader of these files."""
        return DocumentReader(self.paths, self.text_key, self.on_error)


class TextFiles:
    """Text files in the formats of `DocumentReader`.

    Args:
        inputs: files, directories and patterns.
        text_key: key or column of the text.
        on_error: what to do with input that cannot be used.

    Raises:
        DataError: a file is missing, is not a file, or has an unknown suffix; or nothing matches.
    """

    def __init__(self, inputs: Sequence[str | Path], text_key: str, on_error: OnError) -> None:
        self._reader = DocumentReader(inputs, text_key, on_error)
        self._text_key = text_key
        self._on_error: OnError = on_error

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(self._reader.sizes)

    def shares(self, workers: int) -> list[FileShare]:
        """Neighbouring files together, so that no share is small; one share for one worker."""
        least = max(_SHARE_BYTES, self.total // (workers * _SHARES_PER_WORKER))
        groups: list[list[Path]] = [[]]
        size = 0
        for path, own in zip(self._reader.paths, self._reader.sizes, strict=True):
            if workers > 1 and size >= least:
                groups.append([])
                size = 0
            groups[-1].append(path)
            size += own
        return [FileShare(tuple(group), self._text_key, self._on_error) for group in groups]

    def sources(self) -> tuple[SourceFile, ...]:
        """Name and size of every file; what of a name is no text becomes U+FFFD."""
        return tuple(
            SourceFile(path=os.fsencode(path).decode(errors="replace"), bytes=size)
            for path, size in zip(self._reader.paths, self._reader.sizes, strict=True)
        )
