"""The three text formats: a stream of bytes becomes documents, in bounded memory.

A document arrives in pieces, so that its length never matters. What
cannot be used is reported with its place, as `file:line:byte` (both from 1; `file:row` in Parquet).
"""

from __future__ import annotations

import codecs
import io
import json
import lzma
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from relora_ds.errors import DataError

PIECE_LENGTH = 1 << 16
"""Characters after which a document is cut, at a line end or space where there is one. The time and
memory that SentencePiece takes for one text grow faster than its length."""
RECORD_BYTES = 16 << 20
"""Longest JSON record: unlike text, it can only be understood whole."""

OnError = Literal["fail", "skip"]


class Piece(NamedTuple):
    """A part of one document; the parts put together are the document."""

    text: str
    first: bool
    last: bool


@dataclass
class Faults:
    """What becomes of input that cannot be used: the first is an error, or all are counted."""

    on_error: OnError = "fail"
    counts: Counter[str] = field(default_factory=Counter)
    """How often each kind of fault was skipped."""

    def report(self, kind: str, where: str, detail: str) -> None:
        """Raise, or count one fault.

        Args:
            kind: short name under which faults are counted.
            where: place in the input.
            detail: what was found and what to do about it.

        Raises:
            DataError: `on_error` is "fail".
        """
        if self.on_error == "fail":
            raise DataError(
                f"{where}: {kind}: {detail} (--on-error skip counts such input and goes on)"
            )
        self.counts[kind] += 1


class _Fragment(NamedTuple):
    """A line, or a part of a long one, cut between two UTF-8 characters."""

    data: bytes
    line: int
    column: int
    starts_line: bool

    @property
    def ends_line(self) -> bool:
        return self.data.endswith(b"\n")


def read_text(stream: BinaryIO, name: str, faults: Faults) -> Iterator[Piece]:
    """Documents of plain text, each ended by a blank line. A line that cannot be used is left out.

    Args:
        stream: the (decompressed) bytes.
        name: what to call the file in messages.
        faults: receives bytes that are not UTF-8, NUL bytes and damaged compression.
    """
    document: list[str] = []
    length, first = 0, True
    for fragment in _fragments(stream, PIECE_LENGTH, name, faults):
        text = _decode(fragment, name, faults)
        if text is None:
            continue
        if fragment.starts_line and fragment.ends_line and not text.strip():
            if document:
                yield Piece(_normalised(document), first, last=True)
            document, length, first = [], 0, True
            continue
        document.append(text)
        length += len(text)
        if length > PIECE_LENGTH:
            whole = "".join(document)
            at = _cut_position(whole)
            yield Piece(whole[:at].replace("\r\n", "\n"), first, last=False)
            document, length, first = [whole[at:]], len(whole) - at, False
    if document:
        yield Piece(_normalised(document), first, last=True)


def read_jsonl(stream: BinaryIO, name: str, key: str, faults: Faults) -> Iterator[Piece]:
    """Documents of JSON Lines: one object per line, the text under `key`.

    Args:
        stream: the (decompressed) bytes.
        name: what to call the file in messages.
        key: key of the text; `meta.text` is the key `text` within `meta`.
        faults: receives every record that cannot be used.
    """
    for fragment in _fragments(stream, RECORD_BYTES, name, faults):
        if not fragment.starts_line:
            continue  # the rest of a record that was reported as too long
        where = f"{name}:{fragment.line}"
        if not fragment.ends_line and len(fragment.data) >= RECORD_BYTES:
            limit = f"more than {RECORD_BYTES} bytes; store such documents as text"
            faults.report("record too long", f"{where}:1", limit)
            continue
        line = _decode(fragment, name, faults)
        if line is None or not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            at = len(line[: getattr(error, "pos", 0)].encode()) + fragment.column
            faults.report("invalid JSON", f"{where}:{at}", str(error))
            continue
        try:
            value = under(record, key)
        except KeyError as error:
            faults.report("missing text key", f"{where}:1", str(error.args[0]))
        else:
            yield from value_pieces(value, f"{where}:1", key, faults)


def read_parquet(stream: BinaryIO, name: str, key: str, faults: Faults) -> Iterator[Piece]:
    """Documents of Parquet: one per row, the text in column `key`.

    Args:
        stream: the file, seekable.
        name: what to call the file in messages.
        key: name of the column; `meta.text` is the field `text` of the column `meta`.
        faults: receives a damaged file, a missing column and every row that cannot be used.
    """
    row = 0
    try:
        table = parquet.ParquetFile(stream)
        columns = table.schema_arrow.names
        within = None if key in columns or "." not in key else key.partition(".")[2]
        if (key if within is None else key.partition(".")[0]) not in columns:
            faults.report("missing text key", name, f"no column {key!r} among {columns}")
            return
        for batch in table.iter_batches(batch_size=64, columns=[key]):
            if not batch.num_columns:  # the column has no such field
                faults.report("missing text key", name, f"no field {key!r} within its column")
                return
            for value in batch.column(0):
                row += 1
                where = f"{name}:row {row}"
                try:
                    text = value.as_py() if within is None else under(value.as_py(), within)
                except UnicodeDecodeError as error:
                    faults.report("not UTF-8", f"{where}:{error.start + 1}", str(error))
                    continue
                except KeyError as error:
                    faults.report("missing text key", where, str(error.args[0]))
                    continue
                yield from value_pieces(text, where, key, faults)
    except (OSError, pa.ArrowException) as error:
        detail = f"not a complete Parquet file: {error}; write it again"
        faults.report("unreadable file", f"{name}:row {row + 1}", detail)


def without_empty(pieces: Iterator[Piece], faults: Faults) -> Iterator[Piece]:
    """The pieces without documents of nothing but blanks, which are counted."""
    for piece in pieces:
        if piece.first and piece.last and not piece.text.strip():
            faults.counts["empty document"] += 1
            continue
        yield piece


def under(record: object, key: str) -> object:
    """What a record holds under a key, or under the dotted path of one within another.

    Raises:
        KeyError: it holds nothing there; says what it holds.
    """
    if isinstance(record, dict) and key in record:
        return record[key]
    first, dot, rest = key.partition(".")
    if dot and isinstance(record, dict) and first in record:
        return under(record[first], rest)
    found = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise KeyError(f"no key {key!r} in {found}")


def _fragments(stream: BinaryIO, limit: int, name: str, faults: Faults) -> Iterator[_Fragment]:
    """Lines of at most about `limit` bytes; longer ones come in several fragments."""
    buffered = io.BufferedReader(stream, 1 << 18)  # pyright: ignore[reportArgumentType]
    line, column, starts_line = 1, 1, True
    try:
        while data := _complete_character(buffered, buffered.readline(limit)):
            start, size = column, len(data)
            if line == 1 and column == 1 and data.startswith(codecs.BOM_UTF8):
                data = data[len(codecs.BOM_UTF8) :]
                start += len(codecs.BOM_UTF8)
            yield _Fragment(data, line, start, starts_line)
            starts_line = data.endswith(b"\n")
            line, column = (line + 1, 1) if starts_line else (line, column + size)
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
        detail = f"the file is damaged or cut short: {error}; fetch or write it again"
        faults.report("unreadable file", f"{name}:{line}:{column}", detail)
    finally:
        buffered.detach()  # or its finaliser closes a stream that belongs to the caller


def _complete_character(stream: io.BufferedReader, data: bytes) -> bytes:
    """`data`, completed where `readline` cut a long line inside of a UTF-8 character."""
    if not data or data[-1] < 0x80:
        return data
    for _ in range(3):
        following = stream.peek(1)[:1]
        if not following or following[0] & 0xC0 != 0x80:
            break
        data += stream.read(1)
    return data


def _decode(fragment: _Fragment, name: str, faults: Faults) -> str | None:
    """The fragment as text, or None after reporting why it is none."""
    try:
        text = fragment.data.decode()
    except UnicodeDecodeError as error:
        at = error.start
        found = f"byte {fragment.data[at]:#04x}, {error.reason}; convert the file to UTF-8"
        kind = "not UTF-8"
    else:
        if "\0" not in text:
            return text
        at = fragment.data.index(0)
        found = "the file is binary, damaged or UTF-16; convert it to UTF-8"
        kind = "NUL byte"
    faults.report(kind, f"{name}:{fragment.line}:{fragment.column + at}", found)
    return None


def value_pieces(value: object, where: str, key: str, faults: Faults) -> Iterator[Piece]:
    """The pieces of a document that came as one value of any type."""
    if not isinstance(value, str):
        found = type(value).__name__
        faults.report("text is not a string", where, f"{key!r} holds a value of type {found}")
        return
    if "\0" in value:
        faults.report("NUL byte", where, f"character {value.index(chr(0))} of {key!r} is NUL")
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        faults.report("not UTF-8", where, f"{key!r} holds a lone surrogate at {error.start}")
        return
    text = value.replace("\r\n", "\n")
    start = 0
    while len(text) - start > PIECE_LENGTH:
        end = _cut_position(text, start)
        yield Piece(text[start:end], first=start == 0, last=False)
        start = end
    yield Piece(text[start:], first=start == 0, last=True)


def _cut_position(text: str, start: int = 0) -> int:
    """Where to end the piece from `start`: after a line end, else before a space, else anywhere.

    Tokens do not reach over the first two, so that cutting there does not change them; some join
    line ends to blanks that follow, which are avoided where there is another line end. A carriage
    return stays with what follows, which may be its line feed.
    """
    earliest, latest = start + PIECE_LENGTH // 2, start + PIECE_LENGTH
    last = line_end = text.rfind("\n", earliest, latest)
    while line_end >= 0 and not text[line_end + 1 : line_end + 2].strip():
        line_end = text.rfind("\n", earliest, line_end)
    if max(line_end, last) >= 0:
        return (line_end if line_end >= 0 else last) + 1
    space = text.rfind(" ", earliest, latest)
    if space >= 0:
        return space
    return latest - 1 if text[latest - 1] == "\r" else latest


def _normalised(lines: list[str]) -> str:
    return "".join(lines).replace("\r\n", "\n").removesuffix("\n")
