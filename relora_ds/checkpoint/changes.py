"""What a run may change when it goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.config.free import covers, flat_settings, free_keys
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.errors import CheckpointError

_TOKEN_FILES = "token files"
_VALUE = 60  # characters of a value in a message


def check_resume(
    saved: SavedRun, config: RunConfig, architecture: ModelConfig, fingerprints: Sequence[str]
) -> None:
    """Make sure that a checkpoint belongs to a run.

    Settings are compared with defaults filled in: one that was added after the checkpoint was
    written counts as its default there.

    Args:
        fingerprints: of the run's token files.

    Raises:
        CheckpointError: something that the trained function depends on differs; every difference is
            listed as `key: checkpoint X, run Y`.
    """
    record = saved.record
    before = _settings(record.config, record.architecture, record.trainer.data_fingerprints)
    now = _settings(config, architecture, fingerprints)
    allowed = free_keys(RunConfig).union(config.checkpoint.allow_change)
    differing = [
        (key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not covers(allowed, key)
    ]
    if differing:
        keys = ", ".join(key for key, _, _ in differing if key in before and key != _TOKEN_FILES)
        raise CheckpointError(
            f"{saved.checkpoint}: belongs to a run that differs in\n"
            + _table(differing)
            + "\nrestore these values, start anew with checkpoint.resume=false, or allow "
            f"this with checkpoint.allow_change=[{keys}]"
        )


def _table(differing: Sequence[tuple[str, Any, Any]]) -> str:
    """One line per key, in columns: the key, its value in the checkpoint, its value now."""
    rows = [("key", "checkpoint", "run")]
    rows += [(key, _short(before), _short(now)) for key, before, now in differing]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(
        f"  {key:<{widths[0]}}  {before:<{widths[1]}}  {now}" for key, before, now in rows
    )


def _short(value: Any) -> str:
    text = "not there" if value is None else repr(value)
    return text if len(text) <= _VALUE else f"{text[: _VALUE - 3]}..."


def _settings(
    config: RunConfig, architecture: ModelConfig, fingerprints: Sequence[str]
) -> dict[str, Any]:
    """Everything that two runs may differ in, by dotted key, as plain values."""
    flat = dict(flat_settings(config.model_dump(mode="json")))
    flat |= flat_settings(architecture.model_dump(mode="json"), "architecture.")
    return flat | {_TOKEN_FILES: list(fingerprints)}
