"""Running the real command line as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def write_run(run: dict[str, Any], path: Path) -> Path:
    """Store a run description; JSON is YAML."""
    path.write_text(json.dumps(run))
    return path


def start(
    arguments: list[str], processes: int = 1, script: str = "launch/pretrain.py"
) -> subprocess.Popen[str]:
    """Start `script` under the deepspeed launcher, or by itself for one process."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, script, *arguments]
    if processes > 1:
        launcher = Path(sys.executable).with_name("deepspeed")
        port = str(20000 + os.getpid() % 20000)
        command = [str(launcher), "-q", "--num_gpus", str(processes), "--master_port", port]
        command += [script, *arguments]
        environment["PATH"] = f"{launcher.parent}:{environment['PATH']}"
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(
    arguments: list[str],
    processes: int = 1,
    script: str = "launch/pretrain.py",
    timeout_s: int = 240,
) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    process = start(arguments, processes, script)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, output


def metrics(output_dir: Path) -> dict[int, dict[str, Any]]:
    """The training lines of metrics.jsonl by step."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").open()]
    return {line["step"]: line for line in lines if "train/loss" in line}
