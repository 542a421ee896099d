"""Draw a run's loss curve.

Example:
    python tools/plot_run.py runs/quickstart
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from relora_ds.cli.parser import run_tool, tool_parser


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Draw the run that the arguments name and print the picture's path; returns the exit code."""
    parser = tool_parser(__doc__, prog=prog)
    parser.add_argument("run_dir", type=Path, help="output_dir of a run, finished or not")
    parser.add_argument("--output", type=Path, help="picture [RUN_DIR/plots/loss.png]")
    parsed = parser.parse_args(arguments)
    return run_tool(lambda: _plot(parsed))


def _plot(parsed: argparse.Namespace) -> None:
    from relora_ds.train.telemetry.plot import plot_run

    output = parsed.output or parsed.run_dir / "plots" / "loss.png"
    print(plot_run(parsed.run_dir / "metrics.jsonl", output))
