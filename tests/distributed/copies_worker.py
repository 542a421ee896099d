"""The runs of `tensor_worker` with a copy of the model on every rank."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.distributed.tensor_worker import main

if __name__ == "__main__":
    main(Path(sys.argv[1]), tensor=1)
