"""Cases on several gloo ranks: a function by name, called on every rank of a fresh group."""

from __future__ import annotations

import functools
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import TypeVar

from tests.harness.warm import Case, Start, end_session

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")

_GRACE_S = 5.0
"""How long the others may go on after a rank has failed: they have something to say, or wait."""


def rank_environment() -> dict[str, str]:
    """Environment of a process that trains; add its place to it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        # or a machine with GPUs would be asked for theirs
        "CUDA_VISIBLE_DEVICES": "",
        # on a CPU nothing is compiled by torch, but DeepSpeed's ZeRO imports Muon, whose kernels
        # would be: a third of the start
        "TORCHDYNAMO_DISABLE": "1",
        # or DeepSpeed's stage 3 starts `numactl` for every bucket of gradients, to count devices
        "LOCAL_SIZE": "1",
    }


def place(rank: int, world_size: int) -> dict[str, str]:
    """What a launcher tells a rank on its only node."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}


def meeting_point() -> dict[str, str]:
    """Where the ranks of one group find each other."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def free_port() -> int:
    """A port of this host on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Ended:
    """How processes ended.

    Args:
        codes: their exit codes in the order in which they were started; negative for a signal,
            None of those that were killed here.
        first_failure: the code of the one that failed first; 0 if none did.
    """

    codes: list[int | None]
    first_failure: int


class WarmProcess:
    """This end of a process that forks others; see `tests.harness.warm`."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        program = f"from tests.harness.warm import serve; serve({theirs.fileno()})"
        # it ends when our end of the pipe closes, however this process ends
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            env=rank_environment() | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()

    def start(self, starts: Sequence[Start]) -> list[int]:
        """Fork processes; returns their ids."""
        self._pipe.send(list(starts))
        return self._pipe.recv()

    def codes(self, processes: Sequence[int]) -> list[int | None]:
        """Exit codes, None of those that run."""
        self._pipe.send(list(processes))
        return self._pipe.recv()

    def wait(
        self, processes: Sequence[int], timeout_s: float, grace_s: float | None = None
    ) -> Ended:
        """Wait for processes, and leave none of them running.

        Args:
            timeout_s: after which all of them are killed.
            grace_s: after which the others are killed once one has failed; None to let them be.
        """
        deadline = time.monotonic() + timeout_s
        first: int | None = None
        while True:
            codes = self.codes(processes)
            if first is None and any(codes):
                # a signal says less than an exit code that was seen at the same time
                first = max(code for code in codes if code)
                if grace_s is not None:
                    deadline = min(deadline, time.monotonic() + grace_s)
            if None not in codes or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for process, code in zip(processes, codes, strict=True):
            if code is None:
                end_session(process)
        return Ended(codes, first or 0)


@functools.cache
def warm_process() -> WarmProcess:
    """The one of this test process."""
    return WarmProcess()


def run_ranks(
    case: Callable[..., T], world_size: int, timeout_s: float = 400.0, /, **arguments: object
) -> T:
    """Call `case(topology, **arguments)` on every rank of a new group.

    Args:
        case: a function at the top of a module that tests can import.
        world_size: number of ranks.
        timeout_s: after which the ranks are killed.
        arguments: the same for every rank; they are pickled.

    Returns:
        What it returned on rank 0.

    Raises:
        AssertionError: a rank failed or did not end in time; holds the end of every rank's output.
    """
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.pickle"
        logs = [Path(directory) / f"rank_{rank}.txt" for rank in range(world_size)]
        job = Case(pickle.dumps((case, arguments)), str(result))
        environment = rank_environment() | meeting_point()
        starts = [
            Start(job, environment | place(rank, world_size), str(log))
            for rank, log in enumerate(logs)
        ]
        warm = warm_process()
        codes = warm.wait(warm.start(starts), timeout_s, _GRACE_S).codes
        said = [f"-- rank {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs)]
        assert codes == [0] * world_size, "\n".join([f"exit codes {codes}, None: killed", *said])
        return pickle.loads(result.read_bytes())
