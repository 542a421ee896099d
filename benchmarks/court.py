"""Ways to train against each other: one order of the data, one tuning rule, paired seeds.

Every contestant tries its rates on one seed; the best one runs on fresh seeds, which are reported.
A run that has finished is recorded and never repeated, and one that was interrupted goes on from
its checkpoint: the same command continues a court. Exit code 75 means that more is to do.

Writes `records.jsonl`, `court.md`, `court.json`, `curves.png` and `spectra.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    root = str(Path(__file__).resolve().parents[1])
    if root not in sys.path:  # a script's own directory is there, not the checkout's
        sys.path.insert(0, root)
    from benchmarks.trials.command import main as hold

    return hold(__doc__)


if __name__ == "__main__":
    sys.exit(main())
