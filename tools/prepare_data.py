"""Turn text files into a token file that training reads.

    python tools/prepare_data.py --input corpus.jsonl.zst --tokenizer data/tokenizer.model \\
        --output data/c4_train

Writes PREFIX.bin and PREFIX.idx (Megatron's format) and PREFIX.json (what they hold and came from).
Inputs are .txt (a blank line ends a document) and .jsonl, also with .gz or .zst, and .parquet.
Prints one JSON line. Exit codes: 0 done, 2 wrong usage, 3 the data cannot be used.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relora_ds.command_line import add_texts, run_tool, tool_parser
from relora_ds.data.prepare import prepare


def main() -> None:
    parser = tool_parser(__doc__)
    add_texts(parser)
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="SentencePiece model")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="token file to write")
    parsed = parser.parse_args()
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


if __name__ == "__main__":
    sys.exit(run_tool(main))
