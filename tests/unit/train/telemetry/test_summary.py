"""summary.json: complete, strict JSON, replaced in one step."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from relora_ds.config.schema import RunConfig
from relora_ds.errors import ReloraError
from relora_ds.train.telemetry.summary import config_sha256, write_summary

MakeConfig = Callable[..., RunConfig]


def test_a_summary_holds_what_tells_two_runs_apart(tmp_path: Path, make_config: MakeConfig) -> None:
    started = datetime(2026, 1, 2, 5, 0, tzinfo=timezone(timedelta(hours=2)))
    summary = write_summary(
        tmp_path / "summary.json",
        status="diverged",
        reason="the loss of step 7 is not finite",
        figures={"step": 7, "train/loss": math.nan, "eval/perplexity": 24.5},
        config=make_config(),
        world_size=2,
        started_at=started,
        data_fingerprints={"train": "abc"},
        tokenizer_sha256="def",
    )
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["status"] == "diverged"
    assert summary["reason"] == "the loss of step 7 is not finite"
    assert summary["final"] == {"step": 7, "train/loss": None, "eval/perplexity": 24.5}
    assert summary["started_at"] == "2026-01-02T03:00:00+00:00"
    assert datetime.fromisoformat(summary["ended_at"]).utcoffset() == timedelta(0)
    assert summary["hashes"]["data"] == {"train": "abc"}
    assert summary["hashes"]["tokenizer_sha256"] == "def"
    assert summary["hashes"]["config_sha256"] == config_sha256(make_config())
    assert set(summary["versions"]) >= {"relora_ds", "python", "torch", "deepspeed", "numpy"}
    assert summary["versions"]["torch"] == importlib.metadata.version("torch")
    assert summary["hardware"]["world_size"] == 2
    assert summary["hardware"]["host_cores"] >= 1
    assert summary["hardware"]["device"]


def test_the_config_hash_follows_values_only(make_config: MakeConfig) -> None:
    assert config_sha256(make_config()) == config_sha256(make_config(every=10))
    assert config_sha256(make_config()) != config_sha256(make_config(every=11))


def test_a_package_that_is_not_installed_has_no_version(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    summary = write_summary(
        tmp_path / "summary.json",
        status="completed",
        figures={},
        config=make_config(),
        world_size=1,
        started_at=datetime.now(UTC),
    )
    assert summary["versions"]["megatron-core"] is None


def test_a_summary_that_cannot_be_written_is_an_error(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ReloraError, match=r"summary\.json"):
        write_summary(
            tmp_path / "file" / "summary.json",
            status="completed",
            figures={},
            config=make_config(),
            world_size=1,
            started_at=datetime.now(UTC),
        )
