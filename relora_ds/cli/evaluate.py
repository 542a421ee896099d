"""Perplexity of a checkpoint or a Hugging Face directory on a token file.

python tools/evaluate.py --checkpoint runs/quickstart/hf --data data/valid --seq-length 256
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from relora_ds.cli.parser import add_checkpoint, run_tool, tool_parser


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Score what the arguments name and print one JSON line; returns the exit code."""
    parser = tool_parser(__doc__, prog=prog)
    add_checkpoint(parser, ", or an HF directory")
    parser.add_argument("--data", required=True, help="token file prefix, or `builtin`")
    parser.add_argument("--seq-length", type=int, help="default: that of the run, or 2048 at most")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per forward pass")
    parser.add_argument(
        "--protocol",
        choices=("exact", "galore_compat"),
        default="exact",
        help="exact: mean over all tokens; galore_compat: as the published tables of GaLore and "
        "SLTrain, for which --seq-length, --batch-size and --ranks are those of the published run",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        help="processes that galore_compat's rows are dealt out to; they are computed one by one",
    )
    parser.add_argument(
        "--document-mask",
        action=argparse.BooleanOptionalAction,
        help="keep documents in a window apart (data.document_mask); default: as in the run",
    )
    parsed = parser.parse_args(arguments)
    return run_tool(lambda: _evaluate(parsed))


def _evaluate(parsed: argparse.Namespace) -> None:
    from relora_ds.train.evaluate_checkpoint import evaluate_checkpoint

    ranks = parsed.ranks if parsed.protocol == "galore_compat" else None
    how = parsed.seq_length, parsed.batch_size, ranks, parsed.document_mask
    print(json.dumps(evaluate_checkpoint(parsed.checkpoint, parsed.data, *how)))
