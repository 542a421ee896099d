"""All checks, in the order in which one explains the next."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from relora_ds.planning.doctor import hosts
from relora_ds.planning.doctor.finding import Finding
from relora_ds.planning.doctor.hostfile import Node, read_hostfile
from relora_ds.planning.doctor.packages import packages, python_version


def examine(directory: Path, hostfile: Path | None, meeting: bool = True) -> Iterator[Finding]:
    """Look at everything that a run needs, one finding after another.

    Args:
        directory: where results will be written; it need not exist.
        hostfile: of the nodes that will train; None for this machine alone.
        meeting: start processes that meet, which takes some seconds.
    """
    yield from python_version()
    for found in packages():
        yield found
        if found.check == "package torch" and found.status == "problem":
            return  # everything else asks torch
    from relora_ds.planning.doctor import machine
    from relora_ds.planning.doctor.meeting import meet

    yield from machine.accelerator()
    yield from machine.compiler()
    yield from machine.launcher()
    yield from machine.memory()
    yield from machine.disk(directory)
    yield from machine.port()
    yield from machine.variables(os.environ)
    nodes, reached = list[Node](), True
    if hostfile is not None:
        nodes, findings = read_hostfile(hostfile)
        for found in _of_nodes(nodes, findings):
            reached = reached and found.status != "problem"
            yield found
    if not meeting:
        return
    if reached:
        yield from meet(nodes)
    else:
        yield Finding("meeting", "note", "not tried: see the problems of the nodes first")


def _of_nodes(nodes: Sequence[Node], findings: Iterable[Finding]) -> Iterator[Finding]:
    yield from hosts.programs()
    yield from findings
    versions = hosts.own_versions() if nodes else ""
    address = os.environ.get("MASTER_ADDR") or _address()
    for node in nodes:
        answers = True
        for found in hosts.node(node.name, versions):
            answers = answers and not (found.check == "ssh" and found.status == "problem")
            yield found
        if answers:
            yield hosts.way_back(node.name, address)


def _address() -> str:
    """This machine's address on the way to elsewhere; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"
