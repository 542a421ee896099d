"""`launch/pretrain.py` in a process whose faults are planned; see `tests.harness.faults`."""

from __future__ import annotations

import runpy

from tests.harness.faults import arm
from tests.harness.ranks import ROOT

if __name__ == "__main__":
    arm()
    runpy.run_path(str(ROOT / "launch" / "pretrain.py"), run_name="__main__")
