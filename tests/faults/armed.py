"""A script of the project in a process whose faults are planned: its path, and its arguments."""

from __future__ import annotations

import runpy
import sys

from tests.harness.faults import arm
from tests.harness.ranks import ROOT

if __name__ == "__main__":
    arm()
    del sys.argv[0]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
