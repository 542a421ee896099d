"""Look at a machine, or at all nodes of a hostfile, for what would stop a run.

python tools/doctor.py --output-dir runs
python tools/doctor.py --hostfile hosts --json

Looks at interpreter, packages and their versions, GPUs and driver, flash-attn, compiler, launcher,
memory, disk, clocks, ports, variables, ssh, and whether processes meet over NCCL or gloo. Each
warning and problem has a remedy. Exit codes: 0 no problem, 2 at least one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from relora_ds.cli.parser import tool_parser

_PROBLEM = 2


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Print what was found, as it is found; returns the exit code."""
    parser = tool_parser(__doc__, prog=prog)
    parser.add_argument("--hostfile", type=Path, help="lines `name slots=N`; default: this machine")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("."), help="where results will be written [.]"
    )
    parser.add_argument("--no-meeting", action="store_true", help="start no processes that meet")
    parser.add_argument("--json", action="store_true", help="one JSON list, for a program")
    return _examine(parser.parse_args(arguments))


def _examine(parsed: argparse.Namespace) -> int:
    from relora_ds.planning.doctor.examine import examine

    found = []
    for finding in examine(parsed.output_dir, parsed.hostfile, not parsed.no_meeting):
        found.append(finding)
        if not parsed.json:
            print(f"{finding.status:<8} {finding.check}: {finding.said}", flush=True)
            if finding.remedy:
                print(f"{'':<8} -> {finding.remedy}", flush=True)
    problems = sum(finding.status == "problem" for finding in found)
    warnings = sum(finding.status == "warning" for finding in found)
    if parsed.json:
        print(json.dumps([finding.as_dict() for finding in found], indent=1))
    else:
        print(f"{problems} problems, {warnings} warnings")
    return _PROBLEM if problems else 0
