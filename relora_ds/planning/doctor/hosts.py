"""Checks of the nodes of a hostfile: ssh, environment, clocks and the way back."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from threading import Thread

from relora_ds.planning.doctor.finding import Finding

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "StrictHostKeyChecking=yes")
_PATIENCE_S = 30.0
_CLOCK_SECONDS = 2.0
_TIME = re.compile(r"(\d+(?:\.\d+)?)(?:\.\D*)?", re.ASCII)
"""What `date +%s.%N` prints, also where it knows no %N."""
_VERSIONS = (
    "import torch, sys; from importlib.metadata import version as v; "
    "print(sys.version.split()[0], torch.__version__, v('deepspeed'))"
)


def programs() -> Iterator[Finding]:
    """Whether the programs that reach other nodes are there."""
    for name in ("ssh", "pdsh"):
        found = shutil.which(name)
        if found is not None:
            yield Finding(name, "ok", found)
        else:
            remedy = f"apt-get install {'openssh-client' if name == 'ssh' else name}"
            yield Finding(name, "problem", f"{name} is not installed", remedy)


def node(name: str, versions: str) -> Iterator[Finding]:
    """Whether a node is reached without a password, and has this environment and this time.

    Args:
        name: of the node.
        versions: what `own_versions` says here.
    """
    before = time.time()
    command = f"date +%s.%N; {shlex.quote(sys.executable)} -c {shlex.quote(_VERSIONS)}"
    code, said, problem = _run([*_SSH, name, command])
    passed = time.time() - before
    lines = said.splitlines()
    if not lines:
        remedy = f"make `ssh {name} true` work without a password: ssh-copy-id {name}"
        yield Finding("ssh", "problem", f"{name}: {problem or f'exit code {code}'}", remedy)
        return
    # a shell may greet before it runs anything
    times = [(n, match) for n, line in enumerate(lines) if (match := _TIME.fullmatch(line))]
    if not times:
        remedy = f"make `ssh {name} date` print the time of that node"
        yield Finding("ssh", "problem", f"{name} runs no command, it says {lines[0]!r}", remedy)
        return
    yield Finding("ssh", "ok", f"{name} answers")
    at, time_there = times[-1]
    yield _clock(name, float(time_there[1]), before, passed)
    there = lines[at + 1] if at + 1 < len(lines) else ""
    check = "environment"
    if there == versions:
        yield Finding(check, "ok", f"{name} has Python, torch and deepspeed {there}")
    elif there:
        remedy = "install the same versions on all nodes, or share one environment"
        said = f"{name} has Python, torch and deepspeed {there}; here they are {versions}"
        yield Finding(check, "problem", said, remedy)
    else:
        remedy = f"make the environment at the same path on {name}, or share it"
        yield Finding(check, "problem", f"{name}: {sys.executable} does not run", remedy)


def _clock(name: str, there: float, before: float, passed: float) -> Finding:
    """The node answered within `passed` seconds of `before`: its clock is known to within those."""
    skew = max(before - there, there - before - passed, 0.0)
    if skew > _CLOCK_SECONDS:
        remedy = "synchronise the clocks: chronyc makestep"
        return Finding("clock", "warning", f"{name} is {skew:.0f} s off this machine", remedy)
    return Finding("clock", "ok", f"{name} agrees with this machine")


def way_back(name: str, address: str) -> Finding:
    """Whether a node can open a connection to this one, as ranks do where they meet.

    Args:
        address: of this machine, as the node is to reach it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("", 0))
        listener.listen()
        listener.settimeout(_PATIENCE_S)
        port = listener.getsockname()[1]
        thread = Thread(target=_accept, args=(listener,), daemon=True)
        thread.start()
        command = f"timeout 10 bash -c {shlex.quote(f'exec 3<>/dev/tcp/{address}/{port}')}"
        code, _, problem = _run([*_SSH, name, command])
    if code == 0:
        return Finding("network", "ok", f"{name} reaches {address}")
    remedy = "open the ports between the nodes, or set MASTER_ADDR to an address that they reach"
    reason = problem or "the connection was not answered"
    return Finding("network", "problem", f"{name} does not reach {address}: {reason}", remedy)


def own_versions() -> str:
    """Versions of Python, torch and deepspeed here."""
    return _run([sys.executable, "-c", _VERSIONS])[1].strip()


def _accept(listener: socket.socket) -> None:
    try:
        listener.accept()[0].close()
    except OSError:
        return  # nobody came, or the check is over


def _run(command: list[str]) -> tuple[int, str, str]:
    """Exit code, output, and the last line of what was complained about."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        return 1, "", f"no answer within {_PATIENCE_S:.0f} s"
    except OSError as error:
        return 1, "", f"{command[0]}: {error.strerror}"
    complaint = done.stderr.strip().splitlines()
    return done.returncode, done.stdout, complaint[-1] if complaint else ""
