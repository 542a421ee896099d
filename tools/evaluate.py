"""Perplexity of a checkpoint or a Hugging Face directory on a token file.

python tools/evaluate.py --checkpoint runs/quickstart/hf --data data/valid --seq-length 256
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relora_ds.command_line import add_checkpoint, run_tool, tool_parser
from relora_ds.train.evaluate_checkpoint import evaluate_checkpoint


def main() -> None:
    parser = tool_parser(__doc__)
    add_checkpoint(parser, ", or an HF directory")
    parser.add_argument("--data", required=True, help="token file prefix, or `builtin`")
    parser.add_argument("--seq-length", type=int, help="default: that of the run, or 2048 at most")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per forward pass")
    parsed = parser.parse_args()
    sizes = parsed.seq_length, parsed.batch_size
    print(json.dumps(evaluate_checkpoint(parsed.checkpoint, parsed.data, *sizes)))


if __name__ == "__main__":
    sys.exit(run_tool(main))
