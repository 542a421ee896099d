"""Time steps of one global batch, cut over the model against cut over data. See --help.

Prints one JSON line with seconds, bytes and their ratios; the run's data is not read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tensor_parallel import benchmark_tensor
from relora_ds.cli.parser import add_run, run_tool, tool_parser
from relora_ds.config.load import load_run_config

_EXAMPLE = """
example:
  torchrun --nproc_per_node 2 tools/benchmark_tensor.py configs/run/llama_60m_relora.yaml \\
      train.precision=fp32 train.global_batch_size=8
"""


def main() -> None:
    parser = tool_parser(__doc__, _EXAMPLE)
    add_run(parser)
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage of both ways")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind")
    parsed = parser.parse_args()
    loaded = load_run_config(parsed.run, parsed.overrides)
    figures = benchmark_tensor(loaded.config, loaded.architecture, parsed.stage, parsed.repeats)
    if figures is not None:
        print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(run_tool(main))
