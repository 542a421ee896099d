"""What the command-line tools have in common: their parsers, and errors as exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from relora_ds.errors import ConfigError, ReloraError


def tool_parser(text: str | None, example: str = "") -> argparse.ArgumentParser:
    """A parser whose help shows a tool's own text as it is written.

    Args:
        text: `__doc__` of the tool.
        example: shown below the arguments.
    """
    return argparse.ArgumentParser(
        description=text, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """`run` and `overrides`: a run file and changes of its keys."""
    parser.add_argument("run", metavar="RUN.yaml", help="run description")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key")


def add_checkpoint(parser: argparse.ArgumentParser, more: str = "") -> None:
    """`--checkpoint`: a saved run.

    Args:
        more: what else it may be.
    """
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help=f"step_N, a directory of checkpoints (the latest), or a run directory{more}",
    )


def add_texts(parser: argparse.ArgumentParser) -> None:
    """`--input`, `--text-key` and `--on-error`: text files and how to read them."""
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="text files")
    parser.add_argument("--text-key", default="text", help="key or column of the text")
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="stop at the first input that cannot be used, or count it and go on",
    )


def run_tool(work: Callable[[], None]) -> int:
    """The exit code of `work`; what a user can set right is printed, one line per problem."""
    try:
        work()
    except ReloraError as error:
        problems = error.problems if isinstance(error, ConfigError) else [error]
        sys.stderr.writelines(f"error: {problem}\n" for problem in problems)
        return error.exit_code
    return 0
