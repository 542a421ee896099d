"""Turn text files into a token file that training reads.

    python tools/prepare_data.py --input corpus.jsonl.zst --tokenizer data/tokenizer.model \\
        --output data/c4_train

Writes PREFIX.bin and PREFIX.idx (Megatron's format) and PREFIX.json (what they hold and came from).
Inputs are .txt (a blank line ends a document) and .jsonl, also with .gz or .zst, and .parquet.
Prints one JSON line. Exit codes: 0 done, 2 wrong usage, 3 the data cannot be used.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relora_ds.data.prepare import prepare
from relora_ds.errors import ReloraError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="text files")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="SentencePiece model")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="token file to write")
    parser.add_argument("--text-key", default="text", help="key or column of the text")
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="stop at the first input that cannot be used, or count it and go on",
    )
    return parser.parse_args()


def main() -> int:
    """Prepare and report; returns the exit code."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    console = Console(stderr=True)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("encoding", total=None)
            report = prepare(
                arguments.input,
                arguments.tokenizer,
                arguments.output,
                text_key=arguments.text_key,
                on_error=arguments.on_error,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except ReloraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
