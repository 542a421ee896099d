"""Starting a worker on several gloo ranks and collecting what it found.

One start costs about ten seconds, so a worker runs many checks and returns their figures; the
tests that use it assert on them one by one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def rank_environment() -> dict[str, str]:
    """Environment of a process that trains; add its place to it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    # on a CPU nothing is compiled by torch, but DeepSpeed's ZeRO imports Muon, whose kernels would
    # be: a third of the start
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}


def place(rank: int, world_size: int) -> dict[str, str]:
    """What a launcher tells a rank on its only node."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}


def free_port() -> int:
    """A port of this host on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_worker(module: str, world_size: int, directory: Path, timeout_s: int = 400) -> Any:
    """Run `python -m MODULE OUTPUT` on every rank; returns what rank 0 wrote to OUTPUT as JSON."""
    output = directory / f"{module.rpartition('.')[2]}_{world_size}.json"
    environment = rank_environment() | {"PYTHONPATH": str(ROOT)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(world_size):
        log = (directory / f"rank_{rank}.txt").open("w")
        command = [sys.executable, "-m", module, str(output)]
        own = environment | place(rank, world_size)
        processes.append(subprocess.Popen(command, env=own, cwd=ROOT, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((directory / f"rank_{r}.txt").read_text()[-3000:] for r in range(world_size))
    assert codes == [0] * world_size, f"exit codes {codes}\n{logs}"
    return json.loads(output.read_text())
