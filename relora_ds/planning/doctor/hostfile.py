"""A hostfile: nodes, their slots, and the islands that they are of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from relora_ds.planning.doctor.finding import Finding

_LINE = re.compile(
    r"([A-Za-z0-9._-]+)\s+slots=([1-9][0-9]*)(?:\s+island=([A-Za-z0-9._-]+))?\s*(?:#.*)?", re.ASCII
)
_FORM = "write one line `name slots=N` per node"


@dataclass(frozen=True)
class Node:
    """A line of a hostfile."""

    name: str
    slots: int
    """Processes on it."""
    island: str | None
    """Its mark; None without one."""

    def __str__(self) -> str:
        """The line as DeepSpeed's launcher knows it."""
        return f"{self.name} slots={self.slots}"


def read_hostfile(path: Path) -> tuple[list[Node], list[Finding]]:
    """The nodes, and what is wrong with the file."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        return [], [Finding("hostfile", "problem", f"{path}: {error.strerror}", _FORM)]
    nodes, findings = list[Node](), list[Finding]()
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        match = _LINE.fullmatch(text)
        if not text or text.startswith("#"):
            continue
        if match is None:
            remedy = "write `name slots=N`; users and ports go into ~/.ssh/config"
            findings.append(Finding("hostfile", "problem", f"{path}:{number}: {text}", remedy))
        elif match[1] in (node.name for node in nodes):
            said, remedy = f"{path}:{number}: {match[1]} once more", "name every node once"
            findings.append(Finding("hostfile", "problem", said, remedy))
        else:
            nodes.append(Node(match[1], int(match[2]), match[3]))
    if not nodes and not findings:
        findings.append(Finding("hostfile", "problem", f"{path}: names no node", _FORM))
    findings += _islands(path, nodes)
    if not findings:
        names = ", ".join(node.name for node in nodes)
        findings.append(Finding("hostfile", "ok", f"{len(nodes)} nodes: {names}"))
    return nodes, findings


def _islands(path: Path, nodes: Sequence[Node]) -> Iterator[Finding]:
    """What is wrong with the marks: processes are numbered in the order of the file, and neighbours
    are of one island."""
    marked = [node for node in nodes if node.island is not None]
    if not marked:
        return
    if len(marked) < len(nodes):
        said = f"{path}: {len(marked)} of {len(nodes)} nodes have a mark"
        yield Finding("hostfile", "problem", said, "give every node an island=NAME, or none")
        return
    islands = [
        (str(mark), sum(node.slots for node in group))
        for mark, group in groupby(marked, key=lambda node: node.island)
    ]
    names = [mark for mark, _ in islands]
    if again := next((name for name in names if names.count(name) > 1), None):
        said = f"{path}: island={again} is named again after another island"
        yield Finding("hostfile", "problem", said, "order the nodes by island")
    elif len({slots for _, slots in islands}) > 1:
        sizes = ", ".join(f"{mark} has {slots}" for mark, slots in islands)
        said = f"{path}: islands differ in slots: {sizes}"
        yield Finding("hostfile", "problem", said, "make them equally large")
