"""Golden checkpoints to be damaged: copies whose manifests agree with whatever was done to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import write_manifest
from relora_ds.config.reading.source import dump_yaml, read_yaml
from tests.golden.make_checkpoint import checkpoint


@dataclass(frozen=True)
class Saved:
    """A checkpoint and the ways to change it; every change keeps the manifest true."""

    path: Path

    def write(self, name: str, content: bytes) -> None:
        """Replace a file."""
        (self.path / name).write_bytes(content)
        write_manifest(self.path)

    def remove(self, name: str) -> None:
        """Delete a file."""
        (self.path / name).unlink()
        write_manifest(self.path)

    def edit(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change the data of a JSON or YAML file, or the tensors of a safetensors file."""
        path = self.path / name
        if path.suffix == ".safetensors":
            data: dict[str, Any] = load_file(path)
            change(data)
            save_file(data, path)
        elif path.suffix == ".yaml":
            data = read_yaml(path).data
            change(data)
            path.write_text(dump_yaml(data))
        else:
            data = json.loads(path.read_text())
            change(data)
            path.write_text(json.dumps(data))
        write_manifest(self.path)


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """A ReLoRA run of today's format after five updates, one of them followed by a merge."""
    path = tmp_path / "step_5"
    shutil.copytree(checkpoint("relora", 1), path)
    return Saved(path)


@pytest.fixture
def saved_switchlora(tmp_path: Path) -> Saved:
    """A SwitchLoRA run of format 0, whose method has tensors."""
    path = tmp_path / "switchlora" / "step_5"
    shutil.copytree(checkpoint("switchlora", 0), path)
    return Saved(path)


@pytest.fixture
def place() -> Callable[..., Path]:
    """A function that puts a small complete checkpoint into a directory."""

    def put(directory: Path, step: int, *, latest: bool = False) -> Path:
        path = directory / layout.checkpoint(step)
        shutil.copytree(checkpoint("relora", 1), path)
        trainer = json.loads((path / layout.TRAINER).read_text()) | {"step": step}
        (path / layout.TRAINER).write_text(json.dumps(trainer))
        write_manifest(path)
        if latest:
            (directory / layout.LATEST).write_text(path.name)
        return path

    return put
