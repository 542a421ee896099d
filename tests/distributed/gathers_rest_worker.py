"""The cases that `gathers_worker` leaves out. Run by `test_gathers.py` on two ranks."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.distributed.gathers_worker import REST, figures

if __name__ == "__main__":
    figures(REST, (), Path(sys.argv[1]))
