"""Draw a run's loss curve.

Example:
    python tools/plot_run.py runs/quickstart
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relora_ds.errors import ReloraError
from relora_ds.train.telemetry.plot import plot_run


def main() -> int:
    """Plot the run given on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="output_dir of a run, finished or not")
    parser.add_argument("--output", type=Path, help="picture [RUN_DIR/plots/loss.png]")
    args = parser.parse_args()
    output = args.output or args.run_dir / "plots" / "loss.png"
    try:
        print(plot_run(args.run_dir / "metrics.jsonl", output))
    except ReloraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
