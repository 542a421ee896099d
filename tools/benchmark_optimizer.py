"""Time of an update per weight: 32- and 8-bit moments, with fp32 masters and without.

Prints one JSON object: processor nanoseconds per weight, and ratios to 32-bit moments.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relora_ds.cli.parser import run_tool, tool_parser

_EXAMPLE = """
example:
  python tools/benchmark_optimizer.py --elements 8388608 --threads 1
"""


def main() -> None:
    parser = tool_parser(__doc__, _EXAMPLE)
    parser.add_argument("--elements", type=int, default=1 << 23, help="of the parameter")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=9)
    parsed = parser.parse_args()
    import torch

    from benchmarks.optimizer import benchmark_optimizer

    torch.set_num_threads(parsed.threads)
    print(json.dumps(benchmark_optimizer(parsed.elements, parsed.repeat), indent=1))


if __name__ == "__main__":
    sys.exit(run_tool(main))
