"""Time steps of one global batch, cut over the model against cut over data. See --help."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relora_ds.config.load import load_run_config
from relora_ds.train.benchmark_tensor import benchmark_tensor

_EXAMPLE = """
example:
  torchrun --nproc_per_node 2 tools/benchmark_tensor.py configs/run/llama_60m_relora.yaml \\
      train.precision=fp32 train.global_batch_size=8
"""


def main() -> int:
    """Print one JSON line with seconds, bytes and their ratio, from rank 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN.yaml", help="run description; its data is not read")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key")
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage of both ways")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind")
    parsed = parser.parse_args()
    loaded = load_run_config(parsed.run, parsed.overrides)
    figures = benchmark_tensor(loaded.config, loaded.architecture, parsed.stage, parsed.repeats)
    if figures is not None:
        sys.stdout.write(json.dumps(figures) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
