"""The fan-out: what every sink gets, and what happens when one fails."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relora_ds.config.schema import RunConfig
from relora_ds.errors import ConfigError, ReloraError
from relora_ds.train.telemetry.sinks.base import Metrics, Status
from relora_ds.train.telemetry.telemetry import Telemetry

MakeConfig = Callable[..., RunConfig]


class BrokenSink:
    """A sink that fails at whatever it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, step: int, metrics: Metrics) -> None:
        self.calls += 1
        raise RuntimeError("server gone")

    def close(self, status: Status = "completed") -> None:
        self.calls += 1
        raise RuntimeError("server gone")


class RecordingSink:
    """A sink that remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def log(self, step: int, metrics: Metrics) -> None:
        self.told.append((step, dict(metrics)))

    def close(self, status: Status = "completed") -> None:
        self.told.append(status)


def _records(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def test_reports_and_events_reach_the_file_and_the_person(
    tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    telemetry = Telemetry(make_config(), tmp_path, total_steps=100)
    sink = telemetry._optional["recorder"] = RecordingSink()
    telemetry.event(10, "merge: drift 1e-07", {"method/event": "merge"})
    telemetry.event(10, "checkpoint saved")
    telemetry.log(10, {"train/loss": 3.5})
    telemetry.close("preempted")
    telemetry.close("preempted")
    assert _records(tmp_path) == [
        {"step": 10, "method/event": "merge"},
        {"step": 10, "train/loss": 3.5},
    ]
    assert sink.told == [(10, {"method/event": "merge"}), (10, {"train/loss": 3.5}), "preempted"]
    assert caplog.messages[:2] == ["step 10: merge: drift 1e-07", "step 10: checkpoint saved"]
    assert caplog.messages[2].startswith("step 10/100 | loss 3.5000")


def test_a_sink_that_fails_is_warned_about_once_and_dropped(
    tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    telemetry = Telemetry(make_config(), tmp_path, total_steps=100)
    broken = telemetry._optional["mirror"] = BrokenSink()
    after = telemetry._optional["after"] = RecordingSink()
    for step in (1, 2, 3):
        telemetry.log(step, {"train/loss": 1.0})
    telemetry.close("completed")
    assert broken.calls == 1
    assert len(after.told) == 4
    assert [record["step"] for record in _records(tmp_path)] == [1, 2, 3]
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warned == ["mirror failed and is switched off (RuntimeError: server gone)"]


def test_a_sink_that_fails_to_close_does_not_keep_others_open(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    telemetry = Telemetry(make_config(), tmp_path, total_steps=100)
    telemetry._optional["mirror"] = BrokenSink()
    after = telemetry._optional["after"] = RecordingSink()
    telemetry.close("failed")
    assert after.told == ["failed"]


def test_a_failure_of_the_metrics_file_is_an_error(tmp_path: Path, make_config: MakeConfig) -> None:
    telemetry = Telemetry(make_config(), tmp_path, total_steps=100)
    assert telemetry._metrics_file is not None
    telemetry._metrics_file._file.close()
    telemetry._metrics_file._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(ReloraError, match="No space left"):
        telemetry.log(1, {"train/loss": 1.0})
    telemetry.close("failed")


def test_other_ranks_do_nothing(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(wandb={"mode": "online"}, tensorboard=True)
    telemetry = Telemetry(config, tmp_path, total_steps=100, wandb_run_id="abc", is_main=False)
    telemetry.log(1, {"train/loss": 1.0})
    telemetry.event(1, "merge", {"method/event": "merge"})
    telemetry.close("completed")
    assert telemetry.state_dict() == {"wandb_run_id": "abc"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_main", [True, False])
def test_a_missing_package_fails_on_every_rank_alike(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, is_main: bool
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *args: None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        Telemetry(make_config(tensorboard=True), tmp_path, total_steps=100, is_main=is_main)


def test_disabled_wandb_is_never_imported(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    telemetry = Telemetry(make_config(), tmp_path, total_steps=100)
    assert set(telemetry._optional) == {"console"}
    assert telemetry.state_dict() == {"wandb_run_id": None}
    telemetry.close("completed")


def test_every_mirror_is_built_and_resumes_its_curves(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("wandb", "tensorboard"):
        pytest.importorskip(package)
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    config = make_config(wandb={"mode": "offline"}, tensorboard=True)
    run_ids = []
    for resume_step, run_id in ((0, None), (2, "from the checkpoint")):
        telemetry = Telemetry(
            config,
            tmp_path,
            total_steps=100,
            resume_step=resume_step,
            wandb_run_id=run_id and run_ids[0],
        )
        assert set(telemetry._optional) == {"tensorboard", "wandb", "console"}
        for step in range(resume_step + 1, resume_step + 4):
            telemetry.log(step, {"train/loss": 1.0})
        run_ids.append(telemetry.state_dict()["wandb_run_id"])
        telemetry.close("completed")
    assert run_ids[0] == run_ids[1] is not None
    assert [record["step"] for record in _records(tmp_path)] == [1, 2, 3, 4, 5]
    assert {"metrics.jsonl", "tensorboard", "wandb"} == {p.name for p in tmp_path.iterdir()}
