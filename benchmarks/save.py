"""How long training stands still for a checkpoint, in the foreground and in the background.

    python benchmarks/save.py                                  # the quickstart's model, 2 processes
    python benchmarks/save.py configs/run/llama_60m_relora.yaml --saves 10 --processes 2

One run saves both ways by turns, so that what else the machine does hits both alike. Medians over
the saves are printed as one JSON line for each way, in milliseconds:

    held      the whole call of `save`, on the rank that it took longest on
    own       processor time of the training's thread in it, on that rank
    waited    what later steps stood still for the save, which is where its copy must be complete
    slowed    what the save and the updates behind it took beyond the time of so many undisturbed
              ones, the checks before a save and the writer's share of the cores included
    seconds   until the checkpoint was the latest

A last line has the background's share of the foreground: of `held` and `waited`, and of `slowed`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
_WAYS = ("foreground", "background")
_BEHIND = 4  # updates that a save may slow down
_EVERY = 2 * _BEHIND  # updates between saves: the second half of them is undisturbed
_FIRST = 2  # saves that find no memory to use again


def main() -> None:
    """Start the ranks of a run, or be one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", default="configs/run/quickstart.yaml")
    own = ["method.warm_start_steps=0"]
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=own)
    parser.add_argument("--saves", type=int, default=20, help="of each way")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="where checkpoints go; a temporary one")
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.notes is not None:
        train(parsed)
        return
    with tempfile.TemporaryDirectory(dir=parsed.directory) as work:
        start_ranks(parsed.processes, [*sys.argv[1:], "--notes", work])
        notes = [json.loads(Path(work, f"{n}.json").read_text()) for n in range(parsed.processes)]
    print_figures(notes)


def start_ranks(processes: int, arguments: list[str]) -> None:
    """Run this file in processes of this machine, as a launcher would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(PROJECT)}
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | place
        command = [sys.executable, __file__, *arguments]
        quiet = subprocess.DEVNULL
        started.append(subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=quiet))
    if any([process.wait() for process in started]):
        raise SystemExit("the run failed; see what it printed above")


def train(parsed: argparse.Namespace) -> None:
    """One rank of the run: train as usual, with a store that takes turns."""
    from relora_ds.checkpoint.saving.store import CheckpointStore
    from relora_ds.train import run
    from relora_ds.train.main import main as pretrain

    notes: dict[str, list[Any]] = {"saves": [], "polls": []}

    class TakingTurns(CheckpointStore):
        """Saves both ways by turns, and notes how long each took and when steps ended."""

        def save(self, *saved: Any, **named: Any) -> Any:
            way = _WAYS[len(notes["saves"]) % 2]
            behind = {"asynchronous": way == "background"}
            self._settings = self._settings.model_copy(update=behind)
            began, used = time.perf_counter(), time.thread_time()
            ended = super().save(*saved, **named)
            held, used = time.perf_counter() - began, time.thread_time() - used
            notes["saves"].append({"way": way, "held": held, "own": used, "waited": 0.0})
            self._note(ended)
            return ended

        def poll(self) -> Any:
            notes["polls"].append((len(notes["saves"]), time.perf_counter()))
            ended = super().poll()
            self._note(ended)
            return ended

        def hold(self) -> None:
            began = time.perf_counter()
            super().hold()
            if notes["saves"]:
                notes["saves"][-1]["waited"] += time.perf_counter() - began

        def _note(self, ended: Any) -> None:
            for result in ended:
                notes["saves"][-1]["seconds"] = result.seconds

    run.CheckpointStore = TakingTurns
    steps = _EVERY * (2 * parsed.saves + _FIRST) + _EVERY - 1
    code = pretrain(
        [
            parsed.run,
            f"output_dir={parsed.notes / 'run'}",
            f"train.steps={steps}",
            f"checkpoint.every={_EVERY}",
            "checkpoint.keep=2",
            f"log.every={steps}",
            "eval.every=0",
            "schedule.warmup_steps=1",
            *parsed.overrides,
        ]
    )
    if code:
        raise SystemExit(code)
    (parsed.notes / f"{os.environ['RANK']}.json").write_text(json.dumps(notes))


def print_figures(notes: list[dict[str, list[Any]]]) -> None:
    """Print medians over saves, by way.

    Args:
        notes: of every rank.
    """
    count = len(notes[0]["saves"]) - 1  # the last one ends the run
    ends: dict[int, list[float]] = {}
    for saves, moment in notes[0]["polls"]:
        ends.setdefault(saves, []).append(moment)
    steps = {n: [b - a for a, b in itertools.pairwise(at)] for n, at in ends.items()}
    undisturbed = statistics.median(
        step for number in range(_FIRST, count) for step in steps[number + 1][_BEHIND:]
    )
    found: dict[str, list[dict[str, float]]] = {way: [] for way in _WAYS}
    for number in range(_FIRST, count):
        ranks = [rank["saves"][number] for rank in notes]
        slowest = max(ranks, key=lambda each: each["held"] + each["waited"])
        behind = ends[number + 1][_BEHIND - 1] - ends[number][-1]
        found[slowest["way"]].append(
            {key: slowest[key] for key in ("held", "own", "waited")}
            | {"slowed": behind - _BEHIND * undisturbed, "seconds": ranks[0]["seconds"]}
        )
    medians = {
        way: {key: statistics.median(each[key] for each in of_way) for key in of_way[0]}
        for way, of_way in found.items()
    }
    for way, figures in medians.items():
        milliseconds = {key: round(1e3 * value, 2) for key, value in figures.items()}
        print(json.dumps({"save": way, "saves": len(found[way]), **milliseconds}))
    before, behind = medians["foreground"], medians["background"]
    stood = [each["held"] + each["waited"] for each in (before, behind)]
    shares = {
        "held_share": round(stood[1] / stood[0], 4),
        "slowed_share": round(behind["slowed"] / before["slowed"], 4),
        "step": round(1e3 * undisturbed, 2),
    }
    print(json.dumps(shares))


if __name__ == "__main__":
    main()
