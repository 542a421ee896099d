"""Hosts on one machine: namespaces with a network, processes and an sshd of their own.

A host has its own network, PID, UTS, IPC and mount namespace; PID 1 is its sshd, so that killing
PID 1 is a power failure. The disk is shared, as on a cluster with a network file system. Nothing of
the system's ssh is changed: keys and configuration lie in a directory that is mounted over /etc/ssh
inside the hosts only. Linux has no lighter way that still makes `pkill`, `hostname` and ssh real.

    python -m tests.multihost.hosts --rate 100mbit -- COMMAND...

runs COMMAND on the first of two hosts, with the hostfile's path in $HOSTFILE.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

_TOOLS = (
    "ip",
    "tc",
    "unshare",
    "nsenter",
    "setpriv",
    "ssh",
    "ssh-keygen",
    "pdsh",
    "/usr/sbin/sshd",
)
_DEVICE = "eth0"
_NETWORK = "10.77.0"
_SSH_CONFIG = """Host *
  IdentityFile /etc/ssh/id
  IdentitiesOnly yes
  BatchMode yes
  StrictHostKeyChecking yes
  GlobalKnownHostsFile /etc/ssh/ssh_known_hosts
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
_SSHD_CONFIG = """HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
UseDNS no
PrintMotd no
PidFile none
MaxStartups 100
"""
# What PID 1 of a host does before it becomes sshd. A start-up file of the shell may take locks
# (pyenv's does), which a power failure would leave behind for this machine.
_BOOT = """set -e
hostname "$1"
mount --bind "$2/ssh" /etc/ssh
mount --bind "$2/hosts" /etc/hosts
for file in /etc/bash.bashrc /root/.bashrc; do
  [ ! -f "$file" ] || mount --bind /dev/null "$file"
done
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mkdir /run/sshd
cd /
exec env -i PATH="$PATH" /usr/sbin/sshd -D -e
"""


def missing() -> str | None:
    """Why hosts cannot be brought up on this machine; None if they can."""
    if os.geteuid() != 0:
        return "needs root, to create network namespaces"
    absent = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if absent:
        return f"needs {', '.join(absent)}: apt-get install iproute2 openssh-server pdsh"
    probe = f"rd{os.getpid()}-probe"
    added = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if added.returncode != 0:
        return f"`ip netns add` fails: {added.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


class Hosts:
    """Some hosts on a switch, up while the context is entered.

    Args:
        directory: for keys, configuration and logs; created.
        names: of the hosts.
        rate: of every host's link, each way, in the units of tc (`100mbit`); None for no limit.
        pin: whether host i may run on core i alone (modulo their number).
    """

    def __init__(
        self,
        directory: Path,
        names: Sequence[str] = ("host-a", "host-b"),
        rate: str | None = None,
        pin: bool = False,
    ) -> None:
        self.directory = directory.resolve()
        self.names = tuple(names)
        self._rate = rate
        self._pin = pin
        self._switch = f"rd{os.getpid()}-switch"
        self._inits: dict[str, int] = {}
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        try:
            self._configure_ssh()
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "br0", "up")
            for index, name in enumerate(self.names):
                self._connect(index, name)
                self._boot(index, name)
            if self._rate is not None:
                self.limit(self._rate)
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
        for child in self._children:
            child.kill()
            child.wait()
        for namespace in [*map(self._namespace, self.names), self._switch]:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)

    def hostfile(self, **slots: int) -> Path:
        """A hostfile with so many slots on each host; `_` stands for `-` in the names."""
        lines = [f"{name.replace('_', '-')} slots={count}\n" for name, count in slots.items()]
        path = self.directory / ("hostfile_" + "_".join(slots))
        path.write_text("".join(lines))
        return path

    def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        output: IO[str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command on a host, in this directory; its stdout and stderr go to one place.

        Args:
            name: of the host.
            command: what to run.
            environment: all variables that it gets.
            output: where it writes; a pipe if None.
        """
        return subprocess.Popen(
            [*self._enter(name), *command],
            env=dict(environment),
            stdout=subprocess.PIPE if output is None else output,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def output(self, name: str, command: Sequence[str]) -> str:
        """What a command prints on a host."""
        whole = [*self._enter(name), *command]
        return subprocess.run(whole, capture_output=True, text=True).stdout

    def processes(self, name: str, pattern: str) -> dict[int, str]:
        """Command line of each process of a host that matches, by its PID there."""
        if name not in self._inits:
            return {}
        lines = self.output(name, ["pgrep", "-a", "-f", "--", pattern]).splitlines()
        return {int(pid): text for pid, _, text in (line.partition(" ") for line in lines)}

    def kill(self, name: str, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process by its PID on that host."""
        subprocess.run([*self._enter(name), "kill", f"-{int(number)}", str(pid)], check=True)

    def cut(self, name: str) -> None:
        """Take a host's link down: packets are lost without a word to anybody."""
        _ip("-n", self._namespace(name), "link", "set", _DEVICE, "down")

    def mend(self, name: str) -> None:
        """Bring a host's link up again."""
        _ip("-n", self._namespace(name), "link", "set", _DEVICE, "up")

    def crash(self, name: str) -> None:
        """End every process of a host at once; its kernel still resets the connections."""
        os.kill(self._inits.pop(name), signal.SIGKILL)

    def limit(self, rate: str | None) -> None:
        """Limit what every host sends and receives to `rate`, or lift the limit."""
        ends = [(self._namespace(name), _DEVICE) for name in self.names]
        if len(self.names) > 2:  # with two, what one receives is what the other sends
            ends += [(self._switch, f"port{index}") for index in range(len(self.names))]
        for namespace, device in ends:
            in_namespace = ["ip", "netns", "exec", namespace, "tc", "qdisc"]
            queue = ["dev", device, "root"]
            subprocess.run([*in_namespace, "del", *queue], capture_output=True)
            if rate is not None:
                bucket = ["tbf", "rate", rate, "burst", "64kb", "limit", "4mb"]
                subprocess.run([*in_namespace, "add", *queue, *bucket], check=True)

    def _namespace(self, name: str) -> str:
        return f"rd{os.getpid()}-{name}"

    def _enter(self, name: str) -> list[str]:
        init = str(self._inits[name])
        place = ["-m", "-u", "-i", "-n", "-p", f"--wd={Path.cwd()}"]
        # nsenter stays outside and waits; the command must not outlive it
        command = ["nsenter", "-t", init, *place, "--", "setpriv", "--pdeathsig", "KILL", "--"]
        return [*command, *self._core(self.names.index(name))]

    def _core(self, index: int) -> list[str]:
        cores = sorted(os.sched_getaffinity(0))
        return ["taskset", "-c", str(cores[index % len(cores)])] if self._pin else []

    def _configure_ssh(self) -> None:
        ssh = self.directory / "ssh"
        ssh.mkdir(parents=True)
        ssh.chmod(0o700)
        for key in ("id", "host_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key)]
            subprocess.run(command, check=True)
        shutil.copy(ssh / "id.pub", ssh / "authorized_keys")
        (ssh / "ssh_config").write_text(_SSH_CONFIG)
        (ssh / "sshd_config").write_text(_SSHD_CONFIG)
        host_key = " ".join((ssh / "host_key.pub").read_text().split()[:2])
        addresses = {name: f"{_NETWORK}.{i + 1}" for i, name in enumerate(self.names)}
        known = [f"{name},{address} {host_key}\n" for name, address in addresses.items()]
        (ssh / "ssh_known_hosts").write_text("".join(known))
        table = [f"{address} {name}\n" for name, address in addresses.items()]
        (self.directory / "hosts").write_text("127.0.0.1 localhost\n" + "".join(table))

    def _connect(self, index: int, name: str) -> None:
        namespace, port = self._namespace(name), f"port{index}"
        _ip("netns", "add", namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
        pair = ["type", "veth", "peer", "name", _DEVICE, "netns", namespace]
        _ip("-n", self._switch, "link", "add", port, *pair)
        _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
        _ip("-n", namespace, "addr", "add", f"{_NETWORK}.{index + 1}/24", "dev", _DEVICE)
        _ip("-n", namespace, "link", "set", _DEVICE, "up")

    def _boot(self, index: int, name: str) -> None:
        log = self.directory / f"{name}.log"
        spaces = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        command = ["setpriv", "--pdeathsig", "KILL", "--", *self._core(index)]
        command += ["ip", "netns", "exec", self._namespace(name), *spaces, "--mount-proc"]
        command += ["bash", "-c", _BOOT, "boot", name, str(self.directory)]
        with log.open("wb") as output:
            host = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self._children.append(host)
        deadline = time.monotonic() + 20
        while "listening" not in log.read_text():
            if host.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not come up: {log.read_text()}")
            time.sleep(0.05)
        children = Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split()
        self._inits[name] = int(children[0])


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def main() -> int:
    """Run a command on the first host; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2, help="hosts [2]")
    parser.add_argument("--rate", help="of every link, as 100mbit [no limit]")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    reason = missing()
    if reason is not None:
        sys.stderr.write(f"no hosts here: {reason}\n")
        return 2
    names = [f"host-{chr(ord('a') + i)}" for i in range(arguments.count)]
    with (
        tempfile.TemporaryDirectory() as directory,
        Hosts(Path(directory) / "hosts", names, arguments.rate, pin=True) as hosts,
    ):
        path = hosts.hostfile(**{name.replace("-", "_"): 1 for name in names})
        command = ["env", f"HOSTFILE={path}", *arguments.command]
        return subprocess.call([*hosts._enter(names[0]), *command])


if __name__ == "__main__":
    sys.exit(main())
