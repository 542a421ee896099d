"""DeepSpeed's way to its own files, without its unpickling of whatever is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from relora_ds.engine.deepspeed.files import read_shard


class TensorFiles(TorchCheckpointEngine):
    """What a `DeepSpeedEngine` saves and loads its files with.

    DeepSpeed's own loads with `weights_only=False`, which runs any code that a file asks for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True  # what `open_shard` can map

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """What is in a file, on the CPU wherever DeepSpeed asks for it: it copies from there.

        Raises:
            CheckpointError: it cannot be read, or holds something else than plain values.
        """
        return read_shard(Path(path))
