"""Write the merged dense model of a checkpoint as a Hugging Face directory.

python tools/export_hf.py --checkpoint runs/quickstart/checkpoints --output my_model
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relora_ds.errors import ReloraError
from relora_ds.train.export import export_hf


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="step_N, a directory of checkpoints (the latest), or a run directory",
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="float32 keeps merged weights exact; bfloat16 halves the size",
    )
    arguments = parser.parse_args()
    try:
        export_hf(arguments.checkpoint, arguments.output, getattr(torch, arguments.dtype))
    except ReloraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
