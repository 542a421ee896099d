"""Write one self-contained HTML page about a run: losses, events, rates, memory, wire, settings.

python tools/report.py runs/quickstart --output report.html

The run may still be going. With --spectra, read the latest checkpoint and show what training added.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from relora_ds.cli.parser import run_tool, tool_parser


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Write the page of the run that the arguments name and print its path; returns the exit
    code."""
    parser = tool_parser(__doc__, prog=prog)
    parser.add_argument("run_dir", type=Path, help="output_dir of a run, finished or not")
    parser.add_argument("--output", type=Path, help="page [RUN_DIR/report.html]")
    parser.add_argument("--spectra", action="store_true", help="with spectra of the checkpoint")
    parsed = parser.parse_args(arguments)
    return run_tool(lambda: _report(parsed))


def _report(parsed: argparse.Namespace) -> None:
    from relora_ds.train.views.report import write_report

    output = parsed.output or parsed.run_dir / "report.html"
    print(write_report(parsed.run_dir, output, parsed.spectra))
