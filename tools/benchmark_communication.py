"""Bytes and time of communication by method, ZeRO stage and accumulation. See --help.

Measures what the processes of this launch exchange, beside the closed form. Writes OUTPUT.json and
OUTPUT.png and prints a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from benchmarks.communication import (
    Workload,
    benchmark_communication,
    plot_benchmark,
)
from relora_ds.cli.parser import run_tool, tool_parser
from relora_ds.config.architecture import read_model_config

_EXAMPLE = """
example:
  torchrun --nproc_per_node 2 tools/benchmark_communication.py \\
      --model configs/model/llama_quickstart.json --methods full relora --stages 1 2 3 --rank 32
"""


def main() -> None:
    parsed = _parser().parse_args()
    workload = Workload(
        read_model_config(parsed.model),
        tuple(parsed.methods),
        tuple(parsed.stages),
        tuple(parsed.accumulation),
        parsed.rank,
        parsed.precision,
        parsed.micro_batch_size,
        parsed.seq_length,
        parsed.reduction,
        parsed.steps,
        parsed.tp,
    )
    found = benchmark_communication(workload)
    if found is not None:
        parsed.output.parent.mkdir(parents=True, exist_ok=True)
        parsed.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        plot_benchmark(found, parsed.output.with_suffix(".png"))
        _show(found)


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, _EXAMPLE)
    parser.add_argument("--model", required=True, help="JSON with HF LlamaConfig keys")
    parser.add_argument("--methods", nargs="+", default=["full", "relora", "switchlora"])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3], choices=range(4))
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rank", type=int, default=32, help="of the adapters")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument(
        "--reduction", default="micro_batch", choices=("micro_batch", "step"),
        help="train.gradient_reduction",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=6, help="timed steps of either kind")
    parser.add_argument("--tensor", type=_positive, default=1, help="processes that share a model")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_communication"))
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes: write 1 or more")
    return int(text)


def _show(found: dict) -> None:
    table = Table("method", "ZeRO", "k", "MB sent", "expected", "exact", "step ms", "comm.",
                  "MB/s", "counting")  # fmt: skip
    for row in found["rows"]:
        table.add_row(
            row["method"],
            str(row["stage"]),
            str(row["accumulation"]),
            f"{row['wire_bytes'] / 1e6:.3f}",
            f"{row['expected_wire_bytes'] / 1e6:.3f}",
            "yes" if row["exact"] else "no",
            f"{1e3 * row['step_seconds']:.1f}",
            f"{row['communication_share']:.0%}",
            f"{row['bytes_per_second'] / 1e6:.0f}",
            f"{row['counting_share']:.2%}",
        )
    Console(highlight=False).print(
        f"{found['processes']} processes, tensor {found['tensor']}, {found['device']}", table
    )


if __name__ == "__main__":
    sys.exit(run_tool(main))
