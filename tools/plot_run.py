"""Draw a run's loss curve.

Example:
    python tools/plot_run.py runs/quickstart
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relora_ds.command_line import run_tool, tool_parser
from relora_ds.train.telemetry.plot import plot_run


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("run_dir", type=Path, help="output_dir of a run, finished or not")
    parser.add_argument("--output", type=Path, help="picture [RUN_DIR/plots/loss.png]")
    parsed = parser.parse_args()
    output = parsed.output or parsed.run_dir / "plots" / "loss.png"
    print(plot_run(parsed.run_dir / "metrics.jsonl", output))


if __name__ == "__main__":
    sys.exit(run_tool(main))
