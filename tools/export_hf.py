"""Write the merged dense model of a checkpoint as a Hugging Face directory.

python tools/export_hf.py --checkpoint runs/quickstart/checkpoints --output my_model
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relora_ds.checkpoint.export import export_hf
from relora_ds.command_line import add_checkpoint, run_tool, tool_parser


def main() -> None:
    parser = tool_parser(__doc__)
    add_checkpoint(parser)
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="float32 keeps merged weights exact; bfloat16 halves the size",
    )
    parsed = parser.parse_args()
    export_hf(parsed.checkpoint, parsed.output, getattr(torch, parsed.dtype))


if __name__ == "__main__":
    sys.exit(run_tool(main))
