"""Two network namespaces and a slow link between them that may be switched while it is in use.

Where `tests.multihost.hosts` needs an sshd, ranks start here directly; and not every kernel can
delay packets, so that each end of the link is a TUN device, and a thread of this process carries
packets from one to the other, as late and as slowly as told. It needs root and iproute2, no more.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import selectors
import shutil
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

DEVICE = "eth0"
ADDRESSES = ("10.78.0.1", "10.78.0.2")
_MTU = 1500
_TUNSETIFF, _TUN, _NO_HEADER, _CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000
_QUEUE_S = 4.0
"""How long a packet may wait for its turn before it is dropped, as on a real link."""


@dataclass(frozen=True)
class Speed:
    """Of each direction of the link.

    Args:
        bytes_per_second: None for no limit.
        delay: seconds one way.
    """

    bytes_per_second: float | None = None
    delay: float = 0.0


LOCAL = Speed()


def missing() -> str | None:
    """Why there can be no link on this machine; None if there can."""
    if os.geteuid() != 0:
        return "needs root, to create network namespaces"
    if shutil.which("ip") is None or not Path("/dev/net/tun").exists():
        return "needs iproute2 and /dev/net/tun"
    name = _namespace(0)
    added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if added.returncode != 0:
        return f"`ip netns add` fails: {added.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


class Link:
    """Two hosts, up while the context is entered; `speed` may be set at any time."""

    def __init__(self) -> None:
        self.speed = LOCAL
        self._ends: list[int] = []
        self._free = [0.0, 0.0]
        self._over = threading.Event()
        self._carrier = threading.Thread(target=self._carry, daemon=True)

    def __enter__(self) -> Link:
        try:
            for number, address in enumerate(ADDRESSES):
                name = _namespace(number)
                _ip("netns", "add", name)
                self._ends.append(_open_tun(name))
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
                for device in ("lo", DEVICE):
                    _ip("-n", name, "link", "set", device, "up")
            self._carrier.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._carrier.is_alive():
            self._carrier.join()
        for end in self._ends:
            os.close(end)
        for number in range(len(ADDRESSES)):
            subprocess.run(["ip", "netns", "del", _namespace(number)], capture_output=True)

    def start(
        self,
        number: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        output: IO[str],
    ) -> subprocess.Popen[str]:
        """Start a command on host 0 or 1; its stdout and stderr go to one place."""
        inside = ["ip", "netns", "exec", _namespace(number), *command]
        both = {"stdout": output, "stderr": subprocess.STDOUT}
        return subprocess.Popen(inside, env=dict(environment), text=True, **both)

    def start_ranks(
        self, command: Sequence[str], environment: Mapping[str, str], outputs: Sequence[IO[str]]
    ) -> list[subprocess.Popen[str]]:
        """Start one rank of a run on each host."""
        shared = {
            **environment,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": DEVICE,
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": "29500",
            "WORLD_SIZE": str(len(ADDRESSES)),
            "LOCAL_RANK": "0",
        }
        return [
            self.start(rank, command, {**shared, "RANK": str(rank)}, output)
            for rank, output in enumerate(outputs)
        ]

    def _carry(self) -> None:
        """Move packets until the link is taken down."""
        waiting: list[deque[tuple[float, bytes]]] = [deque(), deque()]
        with selectors.DefaultSelector() as selector:
            for number, end in enumerate(self._ends):
                selector.register(end, selectors.EVENT_READ, number)
            while not self._over.is_set():
                next_ = min((queue[0][0] for queue in waiting if queue), default=float("inf"))
                pause = min(0.2, max(0.0, next_ - time.monotonic()))
                for key, _ in selector.select(pause):
                    self._take(key.fd, waiting[1 - key.data], key.data)
                now = time.monotonic()
                for queue, end in zip(waiting, self._ends, strict=True):
                    while queue and queue[0][0] <= now:
                        os.write(end, queue.popleft()[1])

    def _take(self, end: int, queue: deque[tuple[float, bytes]], source: int) -> None:
        """Read what has come to an end, and say when it is to leave the other one."""
        speed = self.speed
        while True:
            try:
                packet = os.read(end, _MTU)
            except BlockingIOError:
                return
            now = time.monotonic()
            begins, length = now, 0.0
            if speed.bytes_per_second is not None:
                begins = max(now, self._free[source])
                length = len(packet) / speed.bytes_per_second
            if begins - now <= _QUEUE_S:
                self._free[source] = begins + length
                queue.append((begins + length + speed.delay, packet))


def _namespace(number: int) -> str:
    return f"rd{os.getpid()}-link{number}"


def _open_tun(namespace: str) -> int:
    """A new TUN device of a namespace; closing it removes it."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as own, open(f"/var/run/netns/{namespace}") as other:
        # of this thread alone
        _enter(libc, other.fileno())
        try:
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            request = struct.pack("16sH22x", DEVICE.encode(), _TUN | _NO_HEADER)
            fcntl.ioctl(device, _TUNSETIFF, request)
        finally:
            _enter(libc, own.fileno())
    return device


def _enter(libc: ctypes.CDLL, namespace: int) -> None:
    if libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
