"""What the processes of a run tell each other about themselves: lines of JSON over TCP."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LONGEST_LINE = 1 << 20
Message = dict[str, Any]


@dataclass(frozen=True)
class Identity:
    """One process, so that it cannot be taken for another.

    Args:
        rank: its rank.
        host: name of its machine.
        pid: in the machine's list of processes.
        born: when it was started, in the kernel's ticks; tells it from a later one of this number.
        machine: this start of the machine, and its list of processes: containers have their own.
    """

    rank: int
    host: str
    pid: int
    born: str
    machine: str

    @classmethod
    def own(cls, rank: int) -> Identity:
        """This process."""
        pid = os.getpid()
        return cls(rank, socket.gethostname(), pid, born(pid), machine())

    def is_alive(self) -> bool:
        """Whether the process is still there, as far as this machine can tell."""
        return self.machine == machine() and self.born != "" and born(self.pid) == self.born

    def kill(self) -> None:
        """End the process if it runs on this machine; it cannot end itself."""
        with contextlib.suppress(OSError):
            if self.is_alive():
                # the descriptor makes sure that no later process of this number is meant
                descriptor = os.pidfd_open(self.pid)
                if self.is_alive():
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                os.close(descriptor)


def born(pid: int) -> str:
    """When a process was started, in ticks since the start of the machine; empty if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # a zombie has ended


def machine() -> str:
    """Names this machine since its last start, and the list of processes that is seen from here."""
    with contextlib.suppress(OSError):
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{started} {os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


class Link:
    """One connection, which never blocks.

    Args:
        connection: is closed with the link.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.is_open = True
        self._buffer = b""

    def send(self, message: Message) -> None:
        """Hand a short message to the system. What a peer does not take any more is lost."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message]:
        """All whole messages that have come; afterwards `is_open` says if more can come."""
        try:
            while chunk := self.connection.recv(1 << 16):
                self._buffer += chunk
            self.is_open = False
        except BlockingIOError:
            pass
        except OSError:
            self.is_open = False
        *lines, self._buffer = self._buffer.split(b"\n")
        try:
            found = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            found = [None]
        messages = [message for message in found if isinstance(message, dict)]
        if len(self._buffer) > _LONGEST_LINE or len(messages) < len(found):
            self.is_open = False  # it speaks something else
        return messages

    def close(self) -> None:
        """Close the connection."""
        self.is_open = False
        with contextlib.suppress(OSError):
            self.connection.close()


def open_server() -> socket.socket:
    """A socket on a free port that listens on every address of this machine."""
    if socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", 0))
    server.setblocking(False)
    return server


def ready(selector: selectors.BaseSelector, timeout_s: float) -> list[Any]:
    """What was registered with the sockets that have something to read."""
    return [key.data for key, _ in selector.select(timeout_s)]
