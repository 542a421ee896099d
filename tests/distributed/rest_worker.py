"""The runs of `tensor_worker` that two ranks which share a model leave out by default."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.distributed.tensor_worker import main

if __name__ == "__main__":
    main(Path(sys.argv[1]), rest=True)
