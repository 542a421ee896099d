"""Turn text files into a token file that training reads.

    python tools/prepare_data.py --input corpus.jsonl.zst --tokenizer data/tokenizer.model \\
        --output data/c4_train

Writes PREFIX.bin and PREFIX.idx (Megatron's format) and PREFIX.json (what they hold and came from).
Inputs are .txt (a blank line ends a document), .jsonl and .json (one object per line), all also
with .gz, .zst, .bz2 or .xz, and .parquet; directories of them, and patterns. Or a data set of
Hugging Face's, saved to a disk or streamed from the hub (--dataset; needs `pip install datasets`).
Prints one JSON line. Exit codes: 0 done, 2 wrong usage, 3 the data cannot be used.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from relora_ds.cli.numbers import Count
from relora_ds.cli.parser import add_texts, run_tool, tool_parser

_TOKENIZER = "SentencePiece model, tokenizer.json, or the directory of a model with one of them"


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Encode the texts that the arguments name and print a report; returns the exit code."""
    parser = tool_parser(__doc__, prog=prog)
    add_texts(parser, or_dataset=True)
    parser.add_argument(
        "--workers",
        type=Count(),
        default=1,
        metavar="N",
        help="processes that share the files, or the rows of a saved data set; the output is the "
        "same for any number",
    )
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help=_TOKENIZER)
    parser.add_argument("--output", required=True, metavar="PREFIX", help="token file to write")
    parsed = parser.parse_args(arguments)
    if parsed.dataset is None and (parsed.split or parsed.dataset_config):
        parser.error("--split and --dataset-config say more about a --dataset: name one")
    return run_tool(lambda: _prepare(parsed))


def _prepare(parsed: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from relora_ds.data.ingest.hub import HubTexts
    from relora_ds.data.ingest.texts import TextFiles, Texts
    from relora_ds.data.prepare import prepare_texts

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    how = parsed.text_key, parsed.on_error
    texts: Texts
    if parsed.dataset is None:
        texts = TextFiles(parsed.input, *how)
    else:
        texts = HubTexts(parsed.dataset, parsed.dataset_config, parsed.split, *how)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("encoding", total=None)
        report = prepare_texts(
            texts,
            parsed.tokenizer,
            parsed.output,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            workers=parsed.workers,
        )
    print(report.model_dump_json())
