"""DeepSpeed's way to its own files: it writes none, and hands over what would be in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine


class TensorFiles(TorchCheckpointEngine):
    """What a `DeepSpeedEngine` saves and loads its files with."""

    def __init__(self) -> None:
        super().__init__()
        self.collected: dict[str, Any] = {}
        """What DeepSpeed saved since it was last emptied, by name of the file; live."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: whoever writes what was collected has a directory."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Keep what is to be in a file."""
        self.collected[Path(path).name] = state_dict
