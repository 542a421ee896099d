"""Reading the token files of a run from the first byte to the last, shared out over processes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

from relora_ds.data.token_files.contents import BlockReport, Contents, join_reports
from relora_ds.data.tokens import TokenFile
from relora_ds.errors import DataError

Gather = Callable[[Any], list[Any]]
"""A collective call: the values that all processes give, in the order of their ranks."""


def _alone(value: Any) -> list[Any]:
    return [value]


def verify_contents(
    files: Sequence[TokenFile], rank: int = 0, gather: Gather = _alone, *, whole: bool = True
) -> None:
    """Check that token files hold what is recorded of them.

    A collective call: the processes of one host share the reading of its files. Hosts are compared
    with each other, since each may have copies of its own.

    Args:
        files: the same ones on every process, in the same order.
        rank: this process among those that call.
        gather: how they exchange what they found.
        whole: False looks only at the ends of files whose contents are recorded.

    Raises:
        DataError: on every process: a file is not what was recorded, cannot be read, holds a
            negative id, or is another one on another host.
    """
    hosts: list[str] = gather(socket.gethostname())
    mates = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    # a file may be there twice, for training and validation
    groups: dict[str, list[TokenFile]] = {}
    found: dict[str, list[BlockReport]] = {}
    problem = None
    try:
        for file in files:
            if whole or not file.trust_record():
                groups.setdefault(file.prefix, []).append(file)
        for prefix, (first, *_) in groups.items():
            found[prefix] = first.examine(mates.index(rank), len(mates))
    except DataError as error:
        problem = str(error)
    reports = gather((problem, found))
    for host, (problem, _) in zip(hosts, reports, strict=True):
        if problem is not None:
            raise DataError(_on_host(problem, host, hosts))
    for prefix, same in groups.items():
        contents = _contents(prefix, hosts, [found[prefix] for _, found in reports])
        for file in same:
            file.accept(contents)


def _contents(prefix: str, hosts: Sequence[str], reports: Sequence[list[BlockReport]]) -> Contents:
    """What the processes of every host found in a file, which must be the same on all hosts."""
    by_host: dict[str, list[list[BlockReport]]] = {}
    for host, blocks in zip(hosts, reports, strict=True):
        by_host.setdefault(host, []).append(blocks)
    contents = {host: join_reports(parts) for host, parts in by_host.items()}
    first, *others = contents
    for host in others:
        if contents[host] != contents[first]:
            raise DataError(
                f"{prefix}.bin: is another file on host {host} than on host {first}; copy all "
                "three files of it again"
            )
    return contents[first]


def _on_host(problem: str, host: str, hosts: Sequence[str]) -> str:
    return problem if len({*hosts}) == 1 else f"host {host}: {problem}"
