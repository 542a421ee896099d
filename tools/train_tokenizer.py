"""Train a SentencePiece tokenizer on text files.

    python tools/train_tokenizer.py --input corpus.txt more.jsonl.zst --vocab-size 32000 \\
        --output data/tokenizer.model

Inputs are .txt (a blank line ends a document) and .jsonl, also with .gz or .zst, and .parquet.
Prints one JSON line. Exit codes: 0 done, 2 wrong usage, 3 the data cannot be used.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relora_ds.command_line import add_texts, run_tool, tool_parser
from relora_ds.data.tokenizer import train_tokenizer


def main() -> None:
    parser = tool_parser(__doc__)
    add_texts(parser)
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="number of ids")
    parser.add_argument("--output", required=True, metavar="FILE", help="model file to write")
    parsed = parser.parse_args()
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


if __name__ == "__main__":
    sys.exit(run_tool(main))
