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


def run_worker(module: str, world_size: int, directory: Path, timeout_s: int = 400) -> Any:
    """Run `python -m MODULE OUTPUT` on every rank; returns what rank 0 wrote to OUTPUT as JSON."""
    output = directory / f"{module.rpartition('.')[2]}_{world_size}.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        log = (directory / f"rank_{rank}.txt").open("w")
        command = [sys.executable, "-m", module, str(output)]
        processes.append(
            subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
        )
    try:
        codes = [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((directory / f"rank_{r}.txt").read_text()[-3000:] for r in range(world_size))
    assert codes == [0] * world_size, f"exit codes {codes}\n{logs}"
    return json.loads(output.read_text())
