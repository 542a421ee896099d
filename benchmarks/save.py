"""How long training stands still for a checkpoint: in the foreground, and in the background.

    python benchmarks/save.py                                  # the quickstart's model, 2 processes
    python benchmarks/save.py configs/run/llama_60m_relora.yaml --steps 30 --processes 2

Two runs of the same file differ in `checkpoint.asynchronous` alone, and are read from their own
`metrics.jsonl`: both stalls, the time until the checkpoint was the latest, the time of the steps
around them, and whether all losses are the same to the last bit. One JSON line per run, and one
that compares them.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run both, print what they measured."""
    parser = argparse.ArgumentParser(description="Stall of a save, measured.")
    parser.add_argument("run", nargs="?", default="configs/run/quickstart.yaml")
    own = ["method.warm_start_steps=0"]
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=own)
    parser.add_argument("--steps", type=int, default=24, help="updates of each run")
    parser.add_argument("--every", type=int, default=4, help="updates between checkpoints")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="where checkpoints go; a temporary one")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=parsed.directory) as work:
        measured = {
            mode: measure(parsed, Path(work, mode), asynchronous)
            for mode, asynchronous in (("foreground", "false"), ("background", "true"))
        }
    for mode, found in measured.items():
        print(json.dumps({"save": mode} | {k: v for k, v in found.items() if k != "losses"}))
    before, behind = measured["foreground"], measured["background"]
    share = behind["stall_seconds"] / before["stall_seconds"]
    alike = before["losses"] == behind["losses"]
    print(json.dumps({"stall_share": round(share, 4), "same_losses": alike}))


def measure(parsed: argparse.Namespace, output: Path, asynchronous: str) -> dict[str, Any]:
    """Medians over the saves of a run, without the first, which finds no memory to use again."""
    train(
        parsed.processes,
        [
            parsed.run,
            f"output_dir={output}",
            f"train.steps={parsed.steps}",
            f"checkpoint.every={parsed.every}",
            f"checkpoint.asynchronous={asynchronous}",
            "checkpoint.keep=2",
            "log.every=1",
            "eval.every=0",
            "schedule.warmup_steps=1",
            *parsed.overrides,
        ],
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    saves = [line for line in lines if "checkpoint/seconds" in line][1:]
    rates = [line["throughput/tokens_per_second"] for line in lines if "train/loss" in line][2:]
    return {
        "bytes": saves[-1]["checkpoint/bytes"],
        "stall_seconds": statistics.median(line["checkpoint/stall_seconds"] for line in saves),
        "seconds": statistics.median(line["checkpoint/seconds"] for line in saves),
        "saves": len(saves),
        "tokens_per_second": statistics.median(rates),
        "losses": [line["train/loss"] for line in lines if "train/loss" in line],
    }


def train(processes: int, arguments: list[str]) -> None:
    """Train in processes of this machine, as a launcher would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "launch/pretrain.py", *arguments]
        quiet = subprocess.DEVNULL
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | place
        started.append(subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=quiet))
    if any([process.wait() for process in started]):
        raise SystemExit("a run failed; see what it printed above")


if __name__ == "__main__":
    main()
