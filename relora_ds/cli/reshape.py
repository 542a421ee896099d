"""Rewrite a checkpoint for other numbers of processes or another ZeRO stage.

python tools/reshape_checkpoint.py --checkpoint runs/mine --output reshaped --data-parallel 4 --tensor 2 --zero-stage 3
deepspeed --num_gpus 8 launch/pretrain.py RUN.yaml parallel.tensor=2 checkpoint.resume=reshaped
"""  # noqa: E501 - commands to be copied

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from relora_ds.cli.numbers import Count
from relora_ds.cli.parser import add_checkpoint, run_tool, tool_parser


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Reshape the checkpoint that the arguments name; returns the exit code."""
    parser = tool_parser(__doc__, prog=prog)
    add_checkpoint(parser)
    parser.add_argument("--output", type=Path, required=True, help="new directory to write")
    parser.add_argument(
        "--data-parallel", type=Count(), help="processes that will continue it; default: as before"
    )
    parser.add_argument(
        "--tensor", type=Count(), help="tensor-parallel processes; default: as before"
    )
    parser.add_argument(
        "--zero-stage", type=Count(0, 3), help="their ZeRO stage; default: as before"
    )
    parsed = parser.parse_args(arguments)
    return run_tool(lambda: _reshape(parsed))


def _reshape(parsed: argparse.Namespace) -> None:
    from relora_ds.checkpoint.rewriting.reshape import reshape_checkpoint

    sizes = parsed.data_parallel, parsed.zero_stage, parsed.tensor
    reshape_checkpoint(parsed.checkpoint, parsed.output, *sizes)
