"""Turn text files into a token file that training reads.

    python tools/prepare_data.py --input corpus.jsonl.zst --tokenizer data/tokenizer.model \\
        --output data/c4_train

Writes PREFIX.bin and PREFIX.idx (Megatron's format) and PREFIX.json (what they hold and came from).
Inputs are .txt (a blank line ends a document), .jsonl and .json (one object per line), all also
with .gz, .zst, .bz2 or .xz, and .parquet; directories of them, and patterns.
Prints one JSON line. Exit codes: 0 done, 2 wrong usage, 3 the data cannot be used.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from relora_ds.cli.parser import add_texts, run_tool, tool_parser

_TOKENIZER = "SentencePiece model, tokenizer.json, or the directory of a model with one of them"


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Encode the texts that the arguments name and print a report; returns the exit code."""
    parser = tool_parser(__doc__, prog=prog)
    add_texts(parser)
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help=_TOKENIZER)
    parser.add_argument("--output", required=True, metavar="PREFIX", help="token file to write")
    parsed = parser.parse_args(arguments)
    return run_tool(lambda: _prepare(parsed))


def _prepare(parsed: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from relora_ds.data.prepare import prepare

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("encoding", total=None)
        report = prepare(
            parsed.input,
            parsed.tokenizer,
            parsed.output,
            text_key=parsed.text_key,
            on_error=parsed.on_error,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(report.model_dump_json())
