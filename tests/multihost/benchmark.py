"""Step time on two hosts at several link speeds: full-rank against 45 % and 10 % trained.

    python -m tests.multihost.benchmark [--rates 1gbit 100mbit] [--steps 8] [--output FILE]

One LLaMA of 10 M parameters, ZeRO 1, fp32, one rank per host on a core of its own, the builtin
corpus. Each side is launched once by launch/multi_node.sh and passes through all link speeds; a
figure is the median over the steps at a speed. Prints a table and writes everything as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from tests.harness.run import metrics, write_run
from tests.multihost.hosts import Hosts, missing

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_SIDES: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "switchlora, 45 %": {"name": "switchlora", "rank": 68},
    "relora, 10 %": {"name": "relora", "rank": 8, "merge_every": 10_000},
}
# the first steps allocate and compile; those around a change of speed belong to neither
_WARM_UP = 4
_TRANSITION = 2


def measure(
    hosts: Hosts, directory: Path, side: str, rates: list[str | None], steps: int
) -> dict[str, Any]:
    """Seconds per step at each link speed, and bytes that a rank sends per step, of one side."""
    window = steps + _TRANSITION
    run = _describe(directory, _SIDES[side], _WARM_UP + window * len(rates))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    hosts.limit(None)
    hostfile, file = hosts.hostfile(host_a=1, host_b=1), write_run(run, directory / "run.yaml")
    command = ["bash", "launch/multi_node.sh", str(hostfile), str(file)]
    process = hosts.start("host-a", command, environment, (directory / "log.txt").open("w"))
    output_dir = Path(run["output_dir"])
    starts: list[int] = []
    for number, rate in enumerate(rates):
        starts.append(_wait(process, output_dir, _WARM_UP + window * number))
        hosts.limit(rate)
    code = process.wait(600)
    if code != 0:
        raise RuntimeError(f"{side}: exit code {code}\n{(directory / 'log.txt').read_text()}")
    lines = metrics(output_dir)
    ends = [*starts[1:], max(lines)]
    tokens = run["train"]["global_batch_size"] * run["train"]["seq_length"]
    seconds = {}
    for rate, first, last in zip(rates, starts, ends, strict=True):
        kept = [lines[step] for step in range(first + _TRANSITION + 1, last + 1)]
        pace = [tokens / line["throughput/tokens_per_second"] for line in kept]
        seconds[rate or "no limit"] = median(pace)
    return {
        "seconds": seconds,
        "wire_bytes": median(line["communication/wire_bytes_per_step"] for line in lines.values()),
    }


def _describe(directory: Path, method: dict[str, Any], steps: int) -> dict[str, Any]:
    (directory / "model.json").write_text(json.dumps(_MODEL))
    return {
        "output_dir": str(directory / "run"),
        "model": str(directory / "model.json"),
        "deepspeed": "configs/zero/zero1.json",
        "method": method,
        "data": {"source": "builtin"},
        "train": {
            "steps": steps,
            "seq_length": 64,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "precision": "fp32",
        },
        "eval": {"every": 0, "batches": 1},
        "checkpoint": {"every": 0},
        "log": {"every": 1},
    }


def _wait(process: subprocess.Popen[str], output_dir: Path, step: int) -> int:
    """The last step done when at least `step` steps were."""
    path = output_dir / "metrics.jsonl"
    while process.poll() is None:
        done = max(metrics(output_dir), default=0) if path.is_file() else 0
        if done >= step:
            return done
        time.sleep(0.05)
    raise RuntimeError(f"ended before step {step} with exit code {process.returncode}")


def _table(sides: dict[str, Any]) -> str:
    """Seconds per step, and how much faster than full-rank."""
    rates = list(sides["full"]["seconds"])
    rows = [f"{'':20}{'MB sent/step':>14}" + "".join(f"{rate:>22}" for rate in rates)]
    for name, side in sides.items():
        cells = [
            f"{s:12.3f} s {sides['full']['seconds'][rate] / s:6.2f} x"
            for rate, s in side["seconds"].items()
        ]
        rows.append(
            f"{name:20}{side['wire_bytes'] / 1e6:14.1f}" + "".join(f"{c:>22}" for c in cells)
        )
    return "\n".join(rows)


def main() -> int:
    """Measure all sides in turn; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"], help="for tc")
    parser.add_argument("--steps", type=int, default=8, help="measured at each speed [8]")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_hosts.json"))
    arguments = parser.parse_args()
    reason = missing()
    if reason is not None:
        sys.stderr.write(f"no hosts here: {reason}\n")
        return 2
    sides = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with Hosts(directory / "hosts", pin=True) as hosts:
            for number, side in enumerate(_SIDES):
                place = directory / str(number)
                place.mkdir()
                rates = [None, *arguments.rates]
                sides[side] = measure(hosts, place, side, rates, arguments.steps)
                sys.stdout.write(f"{side}: {sides[side]}\n")
    cores = len(os.sched_getaffinity(0))
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f} at the end",
        "steps": arguments.steps,
        "sides": sides,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(_table(sides) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
