"""summary.json: how a run ended, with what it takes to tell two runs apart."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import relora_ds
from relora_ds.config.schema import RunConfig
from relora_ds.engine.accelerator import driver_version
from relora_ds.engine.deepspeed.process_group import accelerator_type
from relora_ds.errors import ReloraError
from relora_ds.train.telemetry.atomic import write_atomically
from relora_ds.train.telemetry.sinks.base import Metrics, Status, finite_or_none

_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy")


def write_summary(
    path: Path,
    *,
    status: Status,
    figures: Metrics,
    config: RunConfig,
    world_size: int,
    started_at: datetime,
    data_fingerprints: Mapping[str, str] | None = None,
    tokenizer_sha256: str | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    """Write the summary of a run that ends now, and return it.

    Args:
        path: the file; replaced in one step.
        status: how the run ended.
        figures: final figures by metric name, such as ``step`` and ``eval/perplexity``. A value
            that is not finite is written as null.
        config: resolved configuration, identified by its hash.
        world_size: processes of the run.
        started_at: when this process started, with a time zone.
        data_fingerprints: fingerprint of each data set by the name of its role or path.
        tokenizer_sha256: hash of the tokenizer model.
        reason: one line that says why the run did not complete.

    Raises:
        ReloraError: the file cannot be written.
    """
    summary: dict[str, Any] = {
        "status": status,
        "reason": reason,
        "final": {name: finite_or_none(value) for name, value in figures.items()},
        "started_at": _iso_utc(started_at),
        "ended_at": _iso_utc(datetime.now(UTC)),
        "hashes": {
            "config_sha256": config_sha256(config),
            "data": dict(data_fingerprints or {}),
            "tokenizer_sha256": tokenizer_sha256,
        },
        "versions": _versions(),
        "hardware": _hardware(world_size),
    }
    try:
        write_atomically(path, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise ReloraError(
            f"cannot write {path}: {error.strerror}; free some space or check its permissions"
        ) from error
    return summary


def config_sha256(config: RunConfig) -> str:
    """Hash of the resolved configuration. Neither comments nor the order of keys change it."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _iso_utc(moment: datetime) -> str:
    assert moment.tzinfo is not None, "a time without a zone cannot be converted to UTC"
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str | None]:
    """Versions as installed: importing the engines only to ask them would take seconds."""
    versions: dict[str, str | None] = {
        "relora_ds": relora_ds.__version__,
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _hardware(world_size: int) -> dict[str, str | int | None]:
    """This host: accelerators are counted on it, processes over the whole run."""
    on_cuda = accelerator_type() == "cuda"
    return {
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "devices_per_host": torch.cuda.device_count() if on_cuda else 0,
        "world_size": world_size,
        "host_cores": os.cpu_count(),
        "host_machine": platform.machine(),
    }
