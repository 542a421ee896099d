"""Draw a run's loss curve, or a metric of several runs.

python tools/plot_run.py runs/quickstart
python tools/plot_run.py runs/relora runs/full --metric eval/loss --over tokens --output both.png

One run is drawn with its learning rate and events, into RUN_DIR/plots/loss.png. Several, or another
metric or axis, are drawn into comparison.png. `--over time` counts training alone, `--over bytes`
what a process moves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from relora_ds.cli.parser import run_tool, tool_parser

_LOSS = "train/loss"
_SCALES = ("step", "tokens", "time", "bytes")


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Draw the runs that the arguments name and print the picture's path; returns the exit code."""
    parser = tool_parser(__doc__, prog=prog)
    parser.add_argument(
        "run_dir", type=Path, nargs="+", help="output_dir of a run, finished or not"
    )
    parser.add_argument("--metric", default=_LOSS, help=f"key of metrics.jsonl [{_LOSS}]")
    parser.add_argument("--over", choices=_SCALES, default="step", help="horizontal axis [step]")
    parser.add_argument("--output", type=Path, help="picture; the suffix decides the format")
    parsed = parser.parse_args(arguments)
    return run_tool(lambda: _plot(parsed))


def _plot(parsed: argparse.Namespace) -> None:
    from relora_ds.train.telemetry.plot import plot_run
    from relora_ds.train.views.curves import plot_runs

    if len(parsed.run_dir) == 1 and (parsed.metric, parsed.over) == (_LOSS, "step"):
        (run,) = parsed.run_dir
        print(plot_run(run / "metrics.jsonl", parsed.output or run / "plots" / "loss.png"))
        return
    output = parsed.output or Path("comparison.png")
    print(plot_runs(parsed.run_dir, output, parsed.metric, parsed.over))
