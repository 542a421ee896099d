"""Time one stage-3 merge on slices against gathering whole weights. See --help.

Prints one JSON line with seconds, bytes and their ratios.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.merge import benchmark_merge
from relora_ds.cli.parser import run_tool, tool_parser

_EXAMPLE = """
example:
  torchrun --nproc_per_node 2 tools/benchmark_merge.py --layers 4 --width 1536 --rank 8
"""


def main() -> None:
    parser = tool_parser(__doc__, _EXAMPLE)
    parser.add_argument("--layers", type=int, default=4, help="matrices to merge")
    parser.add_argument("--width", type=int, default=1536, help="columns; rows are 8/3 of them")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--repeats", type=int, default=5, help="the fastest of so many counts")
    parsed = parser.parse_args()
    figures = benchmark_merge(parsed.layers, parsed.width, parsed.rank, parsed.repeats)
    if figures is not None:
        print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(run_tool(main))
