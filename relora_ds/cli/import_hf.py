"""Write a Hugging Face directory of the LLaMA family as a checkpoint of ours that runs begin with.

python tools/import_hf.py --input Llama-3.2-1B --output imported
deepspeed launch/pretrain.py RUN.yaml model=Llama-3.2-1B checkpoint.resume=imported
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from relora_ds.cli.parser import run_tool, tool_parser


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Import the model that the arguments name; returns the exit code."""
    parser = tool_parser(__doc__, prog=prog)
    parser.add_argument("--input", type=Path, required=True, help="directory of the model")
    parser.add_argument("--output", type=Path, required=True, help="new directory to write")
    parser.add_argument(
        "--no-tokenizer", action="store_true", help="take the weights without the tokenizer"
    )
    parsed = parser.parse_args(arguments)
    return run_tool(lambda: _import(parsed))


def _import(parsed: argparse.Namespace) -> None:
    from relora_ds.checkpoint.rewriting.import_hf import import_hf

    import_hf(parsed.input, parsed.output, with_tokenizer=not parsed.no_tokenizer)
