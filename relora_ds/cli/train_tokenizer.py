"""Train a SentencePiece tokenizer on text files.

    python tools/train_tokenizer.py --input corpus.txt more.jsonl.zst --vocab-size 32000 \\
        --output data/tokenizer.model

Inputs are .txt (a blank line ends a document) and .jsonl, also with .gz or .zst, and .parquet.
Prints one JSON line. Exit codes: 0 done, 2 wrong usage, 3 the data cannot be used.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from relora_ds.cli.numbers import Count
from relora_ds.cli.parser import add_texts, run_tool, tool_parser


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Train on the texts that the arguments name and print a summary; returns the exit code."""
    parser = tool_parser(__doc__, prog=prog)
    add_texts(parser)
    parser.add_argument(
        "--vocab-size", type=Count(), required=True, metavar="N", help="number of ids"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="model file to write")
    parsed = parser.parse_args(arguments)
    return run_tool(lambda: _train(parsed))


def _train(parsed: argparse.Namespace) -> None:
    from rich.console import Console

    from relora_ds.data.tokenizer import train_tokenizer

    with Console(stderr=True).status("training the tokenizer"):
        tokenizer = train_tokenizer(
            parsed.input,
            parsed.vocab_size,
            parsed.output,
            text_key=parsed.text_key,
            on_error=parsed.on_error,
        )
    summary = {
        "output": parsed.output,
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
    }
    print(json.dumps(summary))
