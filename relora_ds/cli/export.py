"""Write the merged dense model of a checkpoint as a Hugging Face directory, with a model card.

python tools/export_hf.py --checkpoint runs/quickstart/checkpoints --output my_model

With --peft, write the adapters of lora, relora (since its last merge) or switchlora for the peft
package instead, and their base model into OUTPUT/base. With --push, say what an upload to the
Hugging Face Hub would send; with --push and --confirm, send it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from relora_ds.cli.numbers import amount
from relora_ds.cli.parser import add_checkpoint, run_tool, tool_parser

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Export the checkpoint that the arguments name; returns the exit code."""
    parser = tool_parser(__doc__, prog=prog)
    add_checkpoint(parser)
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--dtype",
        choices=[*_DTYPES, *_DTYPES.values()],
        help="default: fp32, which keeps merged weights exact; of an imported model its own",
    )
    parser.add_argument(
        "--no-tokenizer", action="store_true", help="write the weights without the tokenizer"
    )
    parser.add_argument(
        "--max-shard-size", type=amount, default=5e9, metavar="SIZE", help="of one file, 5GB"
    )
    parser.add_argument(
        "--peft", action="store_true", help="write the adapters, and their base model beside them"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="model on the Hugging Face Hub")
    parser.add_argument("--public", action="store_true", help="make a pushed model public")
    parser.add_argument("--confirm", action="store_true", help="send what --push names")
    parsed = parser.parse_args(arguments)
    for option in ("public", "confirm"):
        if getattr(parsed, option) and parsed.push is None:
            parser.error(f"--{option} has no effect without --push OWNER/NAME")
    return run_tool(lambda: _export(parsed))


def _export(parsed: argparse.Namespace) -> None:
    import torch

    from relora_ds.checkpoint.export.hf import export_hf
    from relora_ds.checkpoint.export.peft import export_peft
    from relora_ds.checkpoint.export.push import check_repo, plan_upload, push

    if parsed.push is not None:
        check_repo(parsed.push)
    write = export_peft if parsed.peft else export_hf
    name = _DTYPES.get(parsed.dtype, parsed.dtype)
    write(
        parsed.checkpoint,
        parsed.output,
        None if name is None else getattr(torch, name),
        with_tokenizer=not parsed.no_tokenizer,
        shard_bytes=int(parsed.max_shard_size),
    )
    if parsed.push is None:
        return
    upload = plan_upload(parsed.output, parsed.push, private=not parsed.public)
    if parsed.confirm:
        print(f"pushed to {push(parsed.output, upload)}")
    else:
        print(f"a push would send {upload}\nnothing was sent: --confirm sends it")
