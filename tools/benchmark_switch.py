"""Time of a switch and of the optimizer that it needs, against the obvious ways.

Prints one JSON object: milliseconds and ratios, medians over repetitions in alternation.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

_EXAMPLE = """
example:
  python tools/benchmark_switch.py --shape 2736x1024 --rank 256 --switches 6
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="2736x1024", help="ROWSxCOLUMNS of the weight")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--switches", type=int, default=6, help="vectors of each factor per event")
    parser.add_argument("--projections", type=int, default=8, help="in the optimizer's timing")
    parser.add_argument("--repeat", type=int, default=30)
    parsed = parser.parse_args()
    from relora_ds.engine.benchmark_switch import benchmark_switch, benchmark_update

    rows, cols = (int(side) for side in parsed.shape.split("x"))
    figures = {
        "one_projection": benchmark_switch(rows, cols, parsed.rank, parsed.switches, parsed.repeat),
        "optimizer": benchmark_update(rows, cols, parsed.rank, parsed.projections, parsed.repeat),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
