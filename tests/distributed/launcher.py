"""Running the real command line as a user would."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.distributed.ranks import ROOT, free_port, place, rank_environment


def write_run(run: dict[str, Any], path: Path) -> Path:
    """Store a run description; JSON is YAML."""
    path.write_text(json.dumps(run))
    return path


def start(
    arguments: list[str], processes: int = 1, script: str = "launch/pretrain.py"
) -> subprocess.Popen[str]:
    """Start `script` under the deepspeed launcher, or by itself for one process."""
    command = [sys.executable, script, *arguments]
    environment = rank_environment()
    if processes > 1:
        launcher = Path(sys.executable).with_name("deepspeed")
        command = [str(launcher), "-q", "--num_gpus", str(processes)]
        command += ["--master_port", str(free_port()), script, *arguments]
        environment["PATH"] = f"{launcher.parent}:{environment['PATH']}"
    return _start(command, environment, subprocess.PIPE)


def run(
    arguments: list[str],
    processes: int = 1,
    script: str = "launch/pretrain.py",
    timeout_s: int = 240,
    *,
    launcher: bool = False,
) -> tuple[int, str]:
    """Exit code and everything that was printed.

    Args:
        launcher: several processes are started by DeepSpeed's launcher, which imports torch twice
            before anything runs; otherwise one by one, and the first one that fails has the code.
    """
    if processes > 1 and not launcher:
        return _run_ranks([sys.executable, script, *arguments], processes, timeout_s)
    process = start(arguments, processes, script)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, output


def _run_ranks(command: list[str], processes: int, timeout_s: int) -> tuple[int, str]:
    deadline, failed = time.monotonic() + timeout_s, 0
    environment = rank_environment()
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryFile("w+") as output:
        ranks = [
            _start(command, environment | place(rank, processes), output)
            for rank in range(processes)
        ]
        try:
            while any(rank.poll() is None for rank in ranks):
                failed = failed or max(rank.returncode or 0 for rank in ranks)
                assert time.monotonic() < deadline, f"not over after {timeout_s} s: {command}"
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
        output.seek(0)
        return failed or max(abs(rank.returncode) for rank in ranks), output.read()


def _start(command: list[str], environment: dict[str, str], output: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def metrics(output_dir: Path) -> dict[int, dict[str, Any]]:
    """The training lines of metrics.jsonl by step."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").open()]
    return {line["step"]: line for line in lines if "train/loss" in line}
