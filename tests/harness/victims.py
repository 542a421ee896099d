"""Whom a fault may kill: processes of its own job, and nobody else.

The number of a process is used again once it has ended, and a process whose parent has ended is
given to a stranger. So a job is a session of its own, and its launchers are found when faults are
armed and kept as descriptors of processes, which never come to mean another one.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Family:
    """The job of one process: its session, and the launchers above it therein.

    Args:
        session: its id, which is also that of the process at its top.
        launchers: descriptors of processes, the parent's first.
    """

    session: int
    launchers: tuple[int, ...]

    @classmethod
    def of_this_process(cls, starter: int) -> Family:
        """Find out what this process belongs to.

        Args:
            starter: session of whoever started the job.

        Raises:
            RuntimeError: it was started in that session: a fault could strike the starter.
        """
        session, launchers = os.getsid(0), []
        if session == starter:
            raise RuntimeError(f"faults are for a session of their own, not for that of {starter}")
        for process in psutil.Process().parents():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                descriptor = os.pidfd_open(process.pid)
                # the number means the same process now as when its descriptor was opened
                if os.getsid(process.pid) == session and process.is_running():
                    launchers.append(descriptor)
                    continue
                os.close(descriptor)
            break
        return cls(session, tuple(launchers))

    def kill_launcher(self, ancestor: int) -> None:
        """Kill one ancestor alone.

        Args:
            ancestor: which one, 1 for the parent.

        Raises:
            ProcessLookupError: it has ended, or is outside the job.
        """
        if ancestor > len(self.launchers):
            raise ProcessLookupError(f"{len(self.launchers)} launchers, none is number {ancestor}")
        signal.pidfd_send_signal(self.launchers[ancestor - 1], signal.SIGKILL)

    def kill_all(self) -> None:
        """Kill the whole group of this process, which does not return then.

        Raises:
            RuntimeError: the group is not that of the job.
        """
        if (os.getpgrp(), os.getsid(0)) != (self.session, self.session):
            raise RuntimeError(f"group {os.getpgrp()} is not that of job {self.session}")
        os.killpg(self.session, signal.SIGKILL)
