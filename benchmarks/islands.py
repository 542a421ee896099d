"""Perplexity, bytes and time of islands beside synchronous training of the same tokens. See --help.

Every cell is a run of its own under torchrun, one after the other: data parallelism without
islands, then every combination of islands, updates per round, bits and outer step, for every seed.
All of them read the same global batches in the same order. A cell that is complete is not run
again, and one that was interrupted goes on from its checkpoint: the same command continues.

Writes OUTPUT/islands.json and prints a table. Bytes are those that a process of the first island
sends to other islands per update, by the closed form; time is the run's own, on this machine: on
one host it says nothing of a slow link, for which `tools/plan.py --islands` has a model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from relora_ds.cli.parser import run_tool, tool_parser
from relora_ds.config.load import load_run_config
from relora_ds.errors import ReloraError
from relora_ds.methods.registry import plan_phases
from relora_ds.planning.islands import plan_islands
from relora_ds.planning.results import Cluster, IslandLink

ROOT = Path(__file__).resolve().parents[1]

_EXAMPLE = """
example:
  python benchmarks/islands.py configs/run/quickstart.yaml --processes 2 --islands 2 \\
      --every 25 50 --bits 32 4 --seeds 1 2 --output runs/islands method.warm_start_steps=250
"""
_OUTER = {
    "plain": {"lr": 1.0, "momentum": 0.0, "nesterov": False},
    "nesterov": {"lr": 0.7, "momentum": 0.9, "nesterov": True},
}
_LINK = IslandLink(bandwidth=1.0)
"""Only bytes are asked of the plan."""


@dataclass(frozen=True)
class Cell:
    """One way to train.

    Args:
        islands: 1 is data parallelism.
        every: updates per round.
        bits: of an element at the end of a round.
        outer: key of `_OUTER`.
        seed: of the run.
    """

    islands: int
    every: int
    bits: int
    outer: str
    seed: int

    @property
    def name(self) -> str:
        """A directory's name, unique among cells."""
        way = "synchronous" if self.islands == 1 else f"{self.islands}x{self.every}"
        return f"{way}_{self.bits}_{self.outer}_{self.seed}"

    def overrides(self) -> list[str]:
        """What it sets in the run file."""
        found = [f"train.seed={self.seed}", f"parallel.islands={self.islands}"]
        if self.islands > 1:
            found.append(f"islands.every={self.every}")
            found.append(f"islands.outer={json.dumps(_OUTER[self.outer])}")
            found.append(f"islands.transport.bits={self.bits}")
        return found


@dataclass(frozen=True)
class Result:
    """What a cell came to."""

    cell: Cell
    perplexity: float
    ratio: float
    """To synchronous training from the same seed."""
    megabytes: float
    """Between islands, per update and process."""
    tokens_per_second: float


def cells(parsed: argparse.Namespace) -> Iterator[Cell]:
    """All that are asked for, the synchronous one of a seed first."""
    for seed in parsed.seeds:
        yield Cell(1, 1, 32, "plain", seed)
        for islands, every, bits, outer in product(
            parsed.islands, parsed.every, parsed.bits, parsed.outer
        ):
            yield Cell(islands, every, bits, outer, seed)


def main(arguments: Sequence[str]) -> int:
    """Run what is missing and print what is known; returns the exit code."""
    parser = _parser()
    parsed = parser.parse_intermixed_args(arguments)
    uneven = [count for count in parsed.islands if count < 1 or parsed.processes % count]
    if uneven:  # or it would show behind the synchronous runs
        parser.error(
            f"--islands {uneven[0]} must divide --processes ({parsed.processes}): "
            "islands have as many processes each"
        )
    return run_tool(lambda: _measure(parsed))


def _measure(parsed: argparse.Namespace) -> None:
    results: list[Result] = []
    synchronous: dict[int, float] = {}
    for cell in cells(parsed):
        apart = parsed.apart if cell.islands > 1 else []
        directory = parsed.output / "_".join([cell.name, *_told_apart(apart)])
        overrides = [*parsed.overrides, *cell.overrides(), *apart, f"output_dir={directory}"]
        summary = _run(parsed.run, overrides, directory, parsed.processes)
        perplexity = float(summary["eval/perplexity"])
        synchronous.setdefault(cell.seed, perplexity)
        megabytes = _megabytes(parsed.run, overrides, parsed.processes)
        speed = float(summary["throughput/tokens_per_second"])
        ratio = perplexity / synchronous[cell.seed]
        results.append(Result(cell, perplexity, ratio, megabytes, speed))
        found = [asdict(each) for each in results]
        (parsed.output / "islands.json").write_text(json.dumps(found, indent=1) + "\n")
    Console(highlight=False).print(_table(results))


def _told_apart(overrides: Sequence[str]) -> list[str]:
    """Part of a directory's name that runs with other overrides do not have."""
    return [hashlib.sha256(repr(overrides).encode()).hexdigest()[:8]] if overrides else []


def _run(run: str, overrides: Sequence[str], directory: Path, processes: int) -> dict[str, Any]:
    """The final figures of a run, which is started if it is not complete.

    Raises:
        ReloraError: it ended otherwise.
    """
    summary = directory / "summary.json"
    if not (summary.is_file() and json.loads(summary.read_text())["status"] == "completed"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes), str(ROOT / "launch" / "pretrain.py")]
        code = subprocess.run([*command, run, *overrides], check=False).returncode
        if code:
            raise ReloraError(f"{directory.name}: the run ended with {code}: see its output above")
    return json.loads(summary.read_text())["final"]


def _megabytes(run: str, overrides: Sequence[str], processes: int) -> float:
    """What a process sends to other islands per update, over the whole run."""
    loaded = load_run_config(run, overrides)
    count = loaded.config.parallel.islands
    if count == 1:
        return 0.0
    cluster = Cluster(processes, gpus_per_node=processes)
    planned = plan_islands(loaded, cluster, _LINK)[1]
    sent = sum(
        phase.steps * planned[phase.name].asked.bytes_per_update
        for phase in plan_phases(loaded.config)
    )
    return sent / loaded.config.train.steps / 1e6 / (processes // count)


def _table(results: Sequence[Result]) -> Table:
    """One row per way, means over seeds."""
    heads = ("islands", "every", "bits", "outer", "perplexity", "to synchronous", "MB per update")
    table = Table(*heads, "tokens/s")
    ways = dict.fromkeys((r.cell.islands, r.cell.every, r.cell.bits, r.cell.outer) for r in results)
    for way in ways:
        same = [
            r for r in results if (r.cell.islands, r.cell.every, r.cell.bits, r.cell.outer) == way
        ]
        each = ", ".join(f"{r.ratio - 1:+.2%}" for r in same)
        table.add_row(
            *map(str, way),
            f"{fmean(r.perplexity for r in same):.2f}",
            each,
            f"{same[0].megabytes:.4f}",
            f"{fmean(r.tokens_per_second for r in same):.0f}",
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, _EXAMPLE)
    parser.add_argument("run", metavar="RUN.yaml", help="what is trained")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="of all runs")
    parser.add_argument("--processes", type=int, default=2, help="of every run, 2")
    parser.add_argument("--islands", type=int, nargs="+", default=[2], metavar="G", help="2")
    parser.add_argument("--every", type=int, nargs="+", default=[25, 50], metavar="H")
    parser.add_argument("--bits", type=int, nargs="+", default=[32], choices=(4, 8, 16, 32))
    parser.add_argument("--outer", nargs="+", default=["plain"], choices=tuple(_OUTER))
    parser.add_argument(
        "--apart",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of runs with islands only, such as islands.inner_lr=1.4",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], metavar="S")
    parser.add_argument("--output", type=Path, default=Path("runs/islands"), metavar="DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
