"""Write the merged dense model of a checkpoint as a Hugging Face directory.

python tools/export_hf.py --checkpoint runs/quickstart/checkpoints --output my_model
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from relora_ds.cli.parser import add_checkpoint, run_tool, tool_parser


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Export the checkpoint that the arguments name; returns the exit code."""
    parser = tool_parser(__doc__, prog=prog)
    add_checkpoint(parser)
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="float32 keeps merged weights exact; bfloat16 halves the size",
    )
    parser.add_argument(
        "--no-tokenizer", action="store_true", help="write the weights without the tokenizer"
    )
    parsed = parser.parse_args(arguments)
    return run_tool(lambda: _export(parsed))


def _export(parsed: argparse.Namespace) -> None:
    import torch

    from relora_ds.checkpoint.export.hf import export_hf

    dtype = getattr(torch, parsed.dtype)
    export_hf(parsed.checkpoint, parsed.output, dtype, with_tokenizer=not parsed.no_tokenizer)
