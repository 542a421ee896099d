"""What a run takes up, moves and needs in time on a cluster. Allocates nothing. See --help."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from relora_ds.cli.numbers import Count, Real, amount
from relora_ds.cli.parser import add_run, run_tool, tool_parser

_EXAMPLE = """
example:
  python tools/plan.py configs/run/llama_1b_switchlora.yaml --gpus 72 --gpu-memory 80GB
"""


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Plan the run that the arguments name and print what was found; returns the exit code."""
    parsed = _parser(prog).parse_intermixed_args(arguments)
    return run_tool(lambda: _plan(parsed))


def _plan(parsed: argparse.Namespace) -> None:
    from rich.console import Console

    from relora_ds.config.load import load_run_config
    from relora_ds.planning.islands import plan_islands
    from relora_ds.planning.plan import plan
    from relora_ds.planning.report import show_islands, show_plan
    from relora_ds.planning.results import Cluster, IslandLink

    names = ("gpus", "gpus_per_node", "gpu_memory", "node_bandwidth", "bandwidth")
    names += ("latency", "peak_flops", "efficiency")
    given = {name: getattr(parsed, name) for name in names}
    cluster = Cluster(**{name: value for name, value in given.items() if value is not None})
    overrides = [*parsed.overrides]
    if parsed.islands is not None:
        overrides.append(f"parallel.islands={parsed.islands}")
    loaded, between = load_run_config(parsed.run, overrides), {}
    if loaded.config.parallel.islands == 1:
        found = plan(loaded, cluster)
    else:
        link = IslandLink(parsed.island_bandwidth, parsed.island_latency)
        found, between = plan_islands(loaded, cluster, link)
    if parsed.json:
        islands = {name: asdict(each) for name, each in between.items()}
        print(json.dumps(found.as_dict() | ({"islands": islands} if islands else {}), indent=1))
        return
    console = Console(highlight=False)
    show_plan(found, console)
    show_islands(between, console)


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, _EXAMPLE, prog)
    add_run(parser)
    parser.add_argument("--gpus", type=Count(), required=True, help="of the whole job")
    parser.add_argument("--gpus-per-node", type=Count(), help="default 8")
    parser.add_argument("--gpu-memory", type=amount, help="default 80GB")
    parser.add_argument("--node-bandwidth", type=amount, help="per GPU within a node, 450GB/s")
    parser.add_argument("--bandwidth", type=amount, help="per GPU between nodes, 50GB/s")
    parser.add_argument(
        "--latency", type=Real(or_zero=True), help="seconds of a collective per doubling, 1e-5"
    )
    parser.add_argument("--peak-flops", type=amount, help="per GPU, 989.4T")
    parser.add_argument(
        "--efficiency", type=Real(1, or_most=True), help="share of the peak that is reached, 0.4"
    )
    parser.add_argument("--islands", type=Count(), help="parallel.islands; --gpus are those of all")
    parser.add_argument(
        "--island-bandwidth",
        type=amount,
        default=125e6,
        help="of the link that the GPUs of an island share: 100Mbit, 1Gbit (default), 12.5MB/s",
    )
    parser.add_argument(
        "--island-latency", type=Real(or_zero=True), default=0.01, help="seconds one way, 0.01"
    )
    parser.add_argument("--json", action="store_true", help="everything, to be read by a program")
    return parser
