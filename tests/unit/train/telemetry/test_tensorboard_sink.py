"""TensorBoard event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from relora_ds.errors import ConfigError
from relora_ds.train.telemetry.sinks.tensorboard import TensorBoardSink


def _scalars(directory: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_scalars_and_events_are_written_and_a_resume_purges(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    first = TensorBoardSink(tmp_path)
    for step in range(1, 6):
        first.log(step, {"train/loss": step, "method/event": "merge", "throughput/mfu": None})
    first.close()
    second = TensorBoardSink(tmp_path, resume_step=3)
    second.log(4, {"train/loss": 40.0})
    second.close()
    assert _scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_a_missing_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str, *args: Any) -> None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        TensorBoardSink(tmp_path)


def test_a_broken_package_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="does not work"):
        TensorBoardSink(tmp_path)
