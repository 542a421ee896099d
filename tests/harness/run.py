"""The command line as a user would run it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.harness.ranks import (
    ROOT,
    free_port,
    meeting_point,
    place,
    rank_environment,
    warm_process,
)
from tests.harness.warm import Script, Start

PRETRAIN = "launch/pretrain.py"


def run(
    arguments: list[str], processes: int = 1, script: str = PRETRAIN, timeout_s: int = 240
) -> tuple[int, str]:
    """Run a script in processes that are forked from one which has imported its libraries.

    Returns:
        The exit code, with several processes that of the first one which failed, and everything
        that was printed.
    """
    job = Script(script, tuple(arguments))
    environment = rank_environment()
    places: list[dict[str, str]] = [{}]
    if processes > 1:
        environment |= meeting_point()
        places = [place(rank, processes) for rank in range(processes)]
    with tempfile.NamedTemporaryFile("r") as output:
        warm = warm_process()
        ranks = warm.start([Start(job, environment | own, output.name) for own in places])
        ended = warm.wait(ranks, timeout_s)
        said = output.read()
        assert None not in ended.codes, f"not over after {timeout_s} s: {arguments}\n{said}"
        return abs(ended.first_failure), said


def run_launcher(
    arguments: list[str], processes: int, script: str = PRETRAIN, timeout_s: int = 240
) -> tuple[int, str]:
    """Run a script under the deepspeed launcher; returns what `run` returns."""
    environment = rank_environment()
    launcher = Path(sys.executable).with_name("deepspeed")
    environment["PATH"] = f"{launcher.parent}:{environment['PATH']}"
    command = [str(launcher), "-q", "--num_gpus", str(processes)]
    command += ["--master_port", str(free_port()), script, *arguments]
    process = _start(command, environment)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, output


def start(arguments: list[str], script: str = PRETRAIN) -> subprocess.Popen[str]:
    """Start a script as a process that imports its libraries itself."""
    return _start([sys.executable, script, *arguments], rank_environment())


def _start(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def write_run(run: dict[str, Any], path: Path) -> Path:
    """Store a run description; JSON is YAML."""
    path.write_text(json.dumps(run))
    return path


def metrics(output_dir: Path) -> dict[int, dict[str, Any]]:
    """The training lines of metrics.jsonl by step."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").open()]
    return {line["step"]: line for line in lines if "train/loss" in line}
