"""Perplexity of a checkpoint or a Hugging Face directory on a token file.

python tools/evaluate.py --checkpoint runs/quickstart/hf --data data/valid --seq-length 256
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relora_ds.errors import ReloraError
from relora_ds.train.evaluate_checkpoint import evaluate_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="step_N, a directory of checkpoints (the latest), a run directory, or an HF directory",
    )
    parser.add_argument("--data", required=True, help="token file prefix, or `builtin`")
    parser.add_argument("--seq-length", type=int, help="default: that of the run, or 2048 at most")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per forward pass")
    arguments = parser.parse_args()
    try:
        result = evaluate_checkpoint(
            arguments.checkpoint, arguments.data, arguments.seq_length, arguments.batch_size
        )
    except ReloraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
