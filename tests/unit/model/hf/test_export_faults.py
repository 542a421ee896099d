"""An export is complete or absent: on a disk that refuses, and after a process that was killed."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_ds.config.model import ModelConfig
from relora_ds.errors import CheckpointError
from relora_ds.model.hf import directory as hf
from relora_ds.model.hf.directory import write_hf
from relora_ds.model.hf.weights import read_hf
from relora_ds.model.init import InitialWeights, dense_shapes

CALLS = ("write", "fsync", "replace")


def export(target: Path, plain: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
    weights = InitialWeights(plain, seed=3)
    tensors = ((name, weights(name, shape)) for name, shape in dense_shapes(plain).items())
    write_hf(target, plain, tensors, None, dtype, shard_bytes=9000)


def refuse(monkeypatch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Have the system refuse its call number `at`; returns the calls."""
    calls: list[str] = []

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            calls.append(name)
            if len(calls) == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **named)

        return wrapped

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    return calls


def test_a_disk_that_is_full_at_any_moment(tmp_path: Path, plain: ModelConfig) -> None:
    export(tmp_path / "counted" / "hf", plain)
    with pytest.MonkeyPatch.context() as patch:
        calls = refuse(patch, -1)
        export(tmp_path / "counted" / "hf", plain, torch.bfloat16)
    assert len(calls) > 10
    for at in range(1, len(calls) + 1, 3):
        target = tmp_path / f"refused_{at}" / "hf"
        export(target, plain)
        with pytest.MonkeyPatch.context() as patch:
            refuse(patch, at)
            with pytest.raises(CheckpointError, match="No space left on device; free some space"):
                export(target, plain, torch.bfloat16)
        assert [path.name for path in target.parent.iterdir()] == ["hf"], at
        read_hf(target)


def test_a_place_that_cannot_be_made(tmp_path: Path, plain: ModelConfig) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"the export to .*/file/hf cannot be written"):
        export(tmp_path / "file" / "hf", plain)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_export_takes_the_place_of_another(
    tmp_path: Path, plain: ModelConfig, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(hf, "exchange", lambda first, second: False)
    export(tmp_path / "hf", plain)
    export(tmp_path / "hf", plain, torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert '"bfloat16"' in (tmp_path / "hf" / "config.json").read_text()


def test_what_a_killed_export_moved_away_comes_back(tmp_path: Path, plain: ModelConfig) -> None:
    export(tmp_path / "hf", plain)
    abandoned = tmp_path / ".hf.abandoned"
    abandoned.mkdir()
    (abandoned / ".owner").write_text(f"{socket.gethostname()} 1")  # nobody holds its lock
    (abandoned / "new").mkdir()
    (tmp_path / "hf").rename(abandoned / "old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "write_file", _fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            export(tmp_path / "hf", plain)
    read_hf(tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def _fail(*arguments: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))
