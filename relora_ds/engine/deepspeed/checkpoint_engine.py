"""DeepSpeed's way to its own files, without its unpickling of whatever is in them.

It writes none: what would be in them is handed over, so that one place writes all of a checkpoint.
"""

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
        self.collected: dict[str, Any] = {}
        """What DeepSpeed saved since it was last emptied, by name of the file; live."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: whoever writes what was collected has a directory."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Keep what is to be in a file."""
        self.collected[Path(path).name] = state_dict

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """What is in a file, on the CPU wherever DeepSpeed asks for it: it copies from there.

        Raises:
            CheckpointError: it cannot be read, or holds something else than plain values.
        """
        return read_shard(Path(path))
