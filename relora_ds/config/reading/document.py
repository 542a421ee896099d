"""Configuration data that remembers where each of its keys was written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from relora_ds.redaction import redact

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where a value was written: a line of a file, or a whole source when there are no lines."""

    source: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


class Finding(NamedTuple):
    """One problem: the key it is about, and what to say about it."""

    path: KeyPath
    message: str


Rule = Callable[..., Iterator[Finding]]
"""Yields what is wrong; its parameters name the sections of the run that it reads."""


@dataclass
class Document:
    """Data of one file, the place of every key, and the problems that did not stop the reading."""

    name: str
    data: dict[str, Any]
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unread: set[KeyPath] = field(default_factory=set)
    """Keys whose value is among the problems, and is None here."""

    def report(self, findings: Iterable[Finding]) -> list[str]:
        """`place: key: message` for each finding, in the order of the file."""
        placed = [
            (self._place(finding.path), finding)
            for finding in findings
            if finding.path not in self.unread
        ]
        # stable: what has no line of its own comes last, as it was found
        placed.sort(key=lambda item: item[0][1].line or sys.maxsize)
        return [self._line(depth, place, finding) for (depth, place), finding in placed]

    def _place(self, path: KeyPath) -> tuple[int, Place]:
        """Place of a key, or of its nearest parent if it was not written, and the depth of that."""
        for depth in range(len(path), -1, -1):
            place = self.places.get(path[:depth])
            if place is not None:
                return depth, place
        return 0, Place(self.name)

    @staticmethod
    def _line(depth: int, place: Place, finding: Finding) -> str:
        # "command line: method.rnk=3" has named the key already
        named = not finding.path or (place.line is None and 0 < depth == len(finding.path))
        key = "" if named else f"{key_name(finding.path)}: "
        return f"{place}: {key}{finding.message}"

    def assign(self, path: KeyPath, value: object, place: Place) -> None:
        """Set `path` to `value`, creating sections on the way; what stood there is forgotten.

        Raises:
            TypeError: a parent of `path` holds something that is not a section; names its key.
        """
        section = self.data
        for length, key in enumerate(path[:-1], start=1):
            if key not in section:
                self.places[path[:length]] = place
            section = section.setdefault(str(key), {})
            if not isinstance(section, dict):
                raise TypeError(key_name(path[:length]))
        section[str(path[-1])] = value
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]
            self.unread.discard(known)
        self.places[path] = place


def key_name(path: KeyPath) -> str:
    """A key path as users write it, `data.train[0]`, shortened where it is longer than any."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return shorten("".join(parts).removeprefix("."))


def shorten(text: str, limit: int = 200) -> str:
    """Text in one line of at most about `limit` characters; what cannot be printed is escaped."""
    plain = text if text.isprintable() else ascii(text)[1:-1]
    return plain if len(plain) <= limit else f"{plain[:limit]}..."


def show(value: object, limit: int = 60) -> str:
    """A value as the file spells it, shortened and without credentials."""
    text = json.dumps(redact(value), ensure_ascii=True, default=str)
    return text if len(text) <= limit else f"{text[:limit]}..."
