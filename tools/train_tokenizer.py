"""Train a SentencePiece tokenizer on text files.

    python tools/train_tokenizer.py --input corpus.txt more.jsonl.zst --vocab-size 32000 \\
        --output data/tokenizer.model

Inputs are .txt (a blank line ends a document) and .jsonl, also with .gz or .zst, and .parquet.
Prints one JSON line. Exit codes: 0 done, 2 wrong usage, 3 the data cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relora_ds.data.tokenizer import train_tokenizer
from relora_ds.errors import ReloraError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="text files")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="number of ids")
    parser.add_argument("--output", required=True, metavar="FILE", help="model file to write")
    parser.add_argument("--text-key", default="text", help="key or column of the text")
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="stop at the first input that cannot be used, or count it and go on",
    )
    return parser.parse_args()


def main() -> int:
    """Train and report; returns the exit code."""
    arguments = parse_arguments()
    try:
        with Console(stderr=True).status("training the tokenizer"):
            tokenizer = train_tokenizer(
                arguments.input,
                arguments.vocab_size,
                arguments.output,
                text_key=arguments.text_key,
                on_error=arguments.on_error,
            )
    except ReloraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    summary = {
        "output": arguments.output,
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
