"""Time of a switch and of the optimizer that it needs, against the obvious ways. See --help.

Prints one JSON object: milliseconds and ratios, medians over repetitions in alternation. With a run
also the share of a training step that switching takes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relora_ds.cli.parser import run_tool, tool_parser

_EXAMPLE = """
example:
  python tools/benchmark_switch.py --shape 2736x1024 --rank 256 --switches 6
  python tools/benchmark_switch.py --run configs/run/llama_130m_switchlora.yaml \\
      model=configs/model/llama_60m.json train.micro_batch_size=8 train.global_batch_size=32
"""
_AGED = {"of one age": 0.0, "half of them aged": 0.5, "aged": 1.0}


def main() -> None:
    parser = tool_parser(__doc__, _EXAMPLE)
    parser.add_argument("--shape", default="2736x1024", help="ROWSxCOLUMNS of the weight")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--switches", type=int, default=6, help="vectors of each factor per event")
    parser.add_argument("--projections", type=int, default=8, help="in the optimizer's timing")
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--run", metavar="RUN.yaml", help="a SwitchLoRA run; its data is not read")
    parser.add_argument("--steps", type=int, default=5, help="of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override its keys")
    parsed = parser.parse_args()
    from benchmarks.switch_kernels import benchmark_switch, benchmark_update

    rows, cols = (int(side) for side in parsed.shape.split("x"))
    shapes, rank, repeat = [(rows, cols)] * parsed.projections, parsed.rank, parsed.repeat
    figures = {
        "one_projection": benchmark_switch(rows, cols, rank, parsed.switches, repeat),
        "optimizer": {
            name: benchmark_update(shapes, rank, aged, repeat) for name, aged in _AGED.items()
        },
    }
    if parsed.run:
        from benchmarks.switch import benchmark_share
        from relora_ds.config.load import load_run_config

        run = load_run_config(parsed.run, parsed.overrides)
        figures["run"] = benchmark_share(run.config, run.architecture, parsed.steps, repeat)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    sys.exit(run_tool(main))
