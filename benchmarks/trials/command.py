"""The command line of a court: holds it, and writes what is known so far."""

from __future__ import annotations

import argparse
import json

from benchmarks.trials.costs import costs_of
from benchmarks.trials.description import Court, load_court
from benchmarks.trials.ledger import Ledger, held
from benchmarks.trials.pictures import draw
from benchmarks.trials.progress import CourtProgress
from benchmarks.trials.running import Runner
from benchmarks.trials.verdict import markdown, reported, standings
from relora_ds.cli.numbers import Count, Real
from relora_ds.cli.parser import run_tool, tool_parser
from relora_ds.errors import PreemptedError, ReloraError
from relora_ds.train.telemetry.atomic import write_atomically

_EXAMPLE = """
examples:
  python benchmarks/court.py configs/court/tiny.yaml --jobs 2
  python benchmarks/court.py configs/court/tiny.yaml --only low_rank_spectral full_muon --seeds 5 6
  python benchmarks/court.py configs/court/paper-60m.yaml --minutes 9 data.train=data/c4_train \\
    data.valid=data/c4_valid data.tokenizer=data/tokenizer.model
"""


def main(text: str | None) -> int:
    """Hold the court that the arguments name; returns the exit code.

    Args:
        text: what the help says.
    """
    parsed = _parser(text).parse_intermixed_args()
    return run_tool(lambda: _hold(parsed))


def _hold(parsed: argparse.Namespace) -> None:
    changes = {"seeds": parsed.seeds, "output_dir": parsed.output}
    given = {key: value for key, value in changes.items() if value is not None}
    court = load_court(parsed.court, parsed.overrides, parsed.only, given)
    with held(court.directory):
        ledger = Ledger(court.directory / "records.jsonl", court.settings)
        is_over = True
        failed: dict[str, str] = {}
        if not parsed.table:
            with CourtProgress(court, ledger) as watcher:
                runner = Runner(court, ledger, parsed.jobs, watcher)
                is_over = runner.hold(None if parsed.minutes is None else 60 * parsed.minutes)
                failed = runner.failed
        _report(court, ledger)
    if failed:
        raise ReloraError("\n".join(failed.values()))
    if not is_over:
        raise PreemptedError("the court is not over: the same command continues it")


def _report(court: Court, ledger: Ledger) -> None:
    """Write what is known, and print the table."""
    costs = {each.name: costs_of(court, each.name) for each in court.contestants}
    found = standings(court, ledger, costs)
    table = markdown(court, found)
    known = [each.as_dict() for each in found]
    write_atomically(court.directory / "court.md", table.encode())
    write_atomically(court.directory / "court.json", json.dumps(known, indent=1).encode())
    runs = {e.title: list(reported(court, e, ledger).values()) for e in court.contestants}
    draw(runs, court.directory)
    print(table)


def _parser(text: str | None) -> argparse.ArgumentParser:
    parser = tool_parser(text, _EXAMPLE)
    parser.add_argument("court", metavar="COURT.yaml", help="contestants, rates and seeds")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of everybody's run")
    parser.add_argument("--jobs", type=Count(), default=1, metavar="N", help="runs at a time, 1")
    parser.add_argument("--minutes", type=Real(), metavar="M", help="interrupt runs after so long")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="contestants")
    parser.add_argument(
        "--seeds", nargs="+", type=Count(0), metavar="S", help="instead of the file's"
    )
    parser.add_argument("--output", metavar="DIR", help="instead of the file's output_dir")
    parser.add_argument("--table", action="store_true", help="run nothing, write the tables")
    return parser
