"""Go on with a text: tokens from a checkpoint or a Hugging Face directory.

python tools/generate.py --checkpoint runs/quickstart --prompt "The function" --max-tokens 40

Without --temperature the likeliest token is taken. Equal arguments give equal texts.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from relora_ds.cli.numbers import Count, Real
from relora_ds.cli.parser import add_checkpoint, run_tool, tool_parser


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Print what follows the prompts that the arguments give; returns the exit code."""
    parser = tool_parser(__doc__, prog=prog)
    add_checkpoint(parser, ", or an HF directory")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated; default: stdin"
    )
    parser.add_argument("--max-tokens", type=Count(), default=100, help="generated at most [100]")
    parser.add_argument(
        "--temperature", type=Real(or_zero=True), default=0.0, help="0.8 is usual [0]"
    )
    parser.add_argument(
        "--top-p", type=Real(1, or_most=True), default=1.0, help="0.95 is usual [1]"
    )
    parser.add_argument("--seed", type=Count(0), default=0, help="of the choices [0]")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt")
    parser.add_argument(
        "--no-cache", action="store_true", help="compute everything again for every token"
    )
    parsed = parser.parse_args(arguments)
    return run_tool(lambda: _generate(parsed))


def _generate(parsed: argparse.Namespace) -> None:
    from relora_ds.model.generation.sample import Sampling
    from relora_ds.train.saved_model.generate import generate_from_checkpoint

    if parsed.prompt is None and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is named below
    prompts = parsed.prompt if parsed.prompt is not None else [sys.stdin.read()]
    sampling = Sampling(parsed.max_tokens, parsed.temperature, parsed.top_p, parsed.seed)
    found = generate_from_checkpoint(parsed.checkpoint, prompts, sampling, not parsed.no_cache)
    for each in found:
        print(json.dumps(asdict(each)) if parsed.json else each.prompt + each.text)
