"""Speed of islands over a slow link beside that over a fast one, in windows of one run.

    python -m tests.multihost.islands [--rate 1Mbit] [--delay 0.1] [--every 50] [--overlap 24] ...

Two hosts, each an island of one rank that trains the quickstart's model with ReLoRA, exchange their
changes in the background. The link is fast and slow by turns, for some rounds each; the first round
of a window belongs to neither. A figure is the median over rounds, as other work disturbs some of
them. Beside the speed stand the seconds that the first island waited for changes, and what
synchronous training would take over the same link by calculation; with --together, also by
measurement, in a run of so many updates that share their gradients. Prints JSON and writes it to a
file. The last exchange, which makes all weights common, is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from relora_ds.cli.numbers import amount
from relora_ds.config.load import load_run_config
from relora_ds.planning.islands import plan_islands
from relora_ds.planning.results import Cluster, IslandLink
from tests.harness.run import metrics
from tests.multihost.link import LOCAL, Link, Speed, missing

_RUN = "configs/run/quickstart.yaml"
_TURNS = ("local", "slow")
_SKIPPED = 5
"""Updates between lines of a synchronous run, of which those at the start do not count."""
Lines = Mapping[int, Mapping[str, Any]]


def overrides(parsed: argparse.Namespace, directory: Path) -> list[str]:
    """What the run sets: one window per turn and repetition, and one round before and after."""
    rounds = 2 + parsed.rounds * len(_TURNS) * parsed.repeat
    transport = {key: getattr(parsed, key) for key in ("bits", "fragments", "overlap")}
    method = {"name": "relora", "rank": parsed.rank, "merge_every": 1_000_000}
    return [
        f"output_dir={directory / 'run'}",
        f"method={json.dumps(method)}",
        f"train.steps={rounds * parsed.every}",
        f"train.micro_batch_size={parsed.batch}",
        f"train.global_batch_size={2 * parsed.batch}",
        "eval={every: 0, batches: 1}",
        "checkpoint={every: 0, resume: false}",
        f"log.every={parsed.every}",
        "parallel.islands=2",
        f"islands.every={parsed.every}",
        f"islands.transport={json.dumps(transport)}",
    ]


def measure(parsed: argparse.Namespace, directory: Path) -> Lines:
    """Metrics at the end of every round of the run, by updates."""
    slow = Speed(parsed.rate, parsed.delay)
    turns = [speed for _ in range(parsed.repeat) for speed in (LOCAL, slow)]
    starts = [parsed.every * (1 + number * parsed.rounds) for number in range(len(turns))]
    return _train(overrides(parsed, directory), directory, dict(zip(starts, turns, strict=True)))


def synchronous(parsed: argparse.Namespace, directory: Path) -> float:
    """Seconds per update over the slow link, where gradients are shared in every one."""
    kept = [
        each
        for each in overrides(parsed, directory)
        if not each.startswith(("islands.", "train.steps", "log.every"))
    ]
    steps = parsed.together + 2 * _SKIPPED
    kept += [f"train.steps={steps}", f"log.every={_SKIPPED}", "schedule.warmup_steps=1"]
    lines = _train(kept, directory, {_SKIPPED: Speed(parsed.rate, parsed.delay)})
    tokens = 2 * parsed.batch * 128
    found = [
        tokens / line["throughput/tokens_per_second"]
        for step, line in lines.items()
        if step > 2 * _SKIPPED
    ]
    return median(found)


def _train(settings: Sequence[str], directory: Path, speeds: Mapping[int, Speed]) -> Lines:
    """Metrics of a run of two hosts, by updates.

    Args:
        speeds: of the link, from the end of an update on.
    """
    command = [sys.executable, "-u", "launch/pretrain.py", _RUN, *settings]
    with ExitStack() as stack:
        link = stack.enter_context(Link())
        logs = [stack.enter_context((directory / f"rank_{n}.txt").open("w")) for n in (0, 1)]
        ranks = link.start_ranks(command, os.environ, logs)
        for rank in ranks:
            stack.callback(rank.kill)
        for step, speed in speeds.items():
            _wait(ranks[0], directory, step)
            link.speed = speed
        codes = [rank.wait(3600) for rank in ranks]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}\n{(directory / 'rank_0.txt').read_text()[-3000:]}")
    return metrics(directory / "run")


def figures(parsed: argparse.Namespace, lines: Lines) -> dict[str, Any]:
    """Seconds per update, and of these waited for changes, by turn."""
    tokens = 2 * parsed.batch * 128
    seconds: dict[str, list[float]] = {turn: [] for turn in _TURNS}
    waited: dict[str, list[float]] = {turn: [] for turn in _TURNS}
    every = parsed.every
    for number in range(parsed.repeat * len(_TURNS)):
        turn, first = _TURNS[number % len(_TURNS)], 1 + number * parsed.rounds
        for index in range(first + 2, first + parsed.rounds + 1):  # after that of the transition
            end, before = lines[index * every], lines[(index - 1) * every]
            seconds[turn].append(tokens / end["throughput/tokens_per_second"])
            gone = end["islands/wait_seconds"] - before["islands/wait_seconds"]
            waited[turn].append(gone / every)
    last = sorted(lines)[-2:]
    return {
        "seconds per update": {turn: median(found) for turn, found in seconds.items()},
        "waited per update": {turn: median(found) for turn, found in waited.items()},
        "speed": median(seconds["local"]) / median(seconds["slow"]),
        "last exchange": lines[last[1]]["islands/wait_seconds"]
        - lines[last[0]]["islands/wait_seconds"],
        "rounds": seconds,
    }


def predicted(parsed: argparse.Namespace, directory: Path, local: float) -> dict[str, float]:
    """What travels, and seconds of an update that is synchronous over the slow link."""
    loaded = load_run_config(_RUN, overrides(parsed, directory))
    link = IslandLink(parsed.rate, parsed.delay)
    plan = plan_islands(loaded, Cluster(2, gpus_per_node=1), link)[1]["relora"]
    together = [each for each in overrides(parsed, directory) if not each.startswith("islands.")]
    shared = plan_islands(load_run_config(_RUN, together), Cluster(2, gpus_per_node=1), link)[1]
    sent = shared["relora"].asked.bytes_per_update

    def seconds(size: float) -> float:
        return local + size / parsed.rate + 2 * parsed.delay

    return {
        "bytes per round": plan.round_bytes,
        "bytes of a fragment": plan.fragment_bytes,
        "a fragment's seconds": plan.fragment_bytes / parsed.rate + 2 * parsed.delay,
        "synchronous, gradients of what is trained": seconds(sent),
        "synchronous, full model in bf16": seconds(plan.dense_bytes),
    }


def _wait(process: subprocess.Popen[str], directory: Path, step: int) -> None:
    path = directory / "run" / "metrics.jsonl"
    while max(metrics(directory / "run"), default=0) < step if path.is_file() else True:
        if process.poll() is not None:
            log = (directory / "rank_0.txt").read_text()
            raise RuntimeError(f"ended before step {step}: {log[-3000:]}")
        time.sleep(0.2)


def main() -> int:
    """Measure once; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=amount, default=amount("1Mbit"), help="[1Mbit]")
    parser.add_argument("--delay", type=float, default=0.1, help="seconds one way [0.1]")
    parser.add_argument("--every", type=int, default=50, help="updates per round [50]")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8, 16, 32))
    parser.add_argument("--fragments", type=int, default=2)
    parser.add_argument("--overlap", type=int, default=24)
    parser.add_argument("--rank", type=int, default=8, help="r of the factors [8]")
    parser.add_argument("--batch", type=int, default=8, help="sequences per island [8]")
    parser.add_argument("--rounds", type=int, default=3, help="in a window [3]")
    parser.add_argument("--repeat", type=int, default=4, help="windows of each kind [4]")
    parser.add_argument("--together", type=int, default=0, help="synchronous updates [0]")
    parser.add_argument("--output", type=Path, default=Path("runs/islands_hosts.json"))
    parsed = parser.parse_args()
    reason = missing()
    if reason is not None:
        sys.stderr.write(f"no hosts here: {reason}\n")
        return 2
    measured = {}
    if parsed.together:
        with tempfile.TemporaryDirectory() as name:
            measured["synchronous"] = synchronous(parsed, Path(name))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        found = measured | figures(parsed, measure(parsed, directory))
        local = found["seconds per update"]["local"]
        found["predicted"] = predicted(parsed, directory, local)
    parsed.output.parent.mkdir(parents=True, exist_ok=True)
    parsed.output.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
