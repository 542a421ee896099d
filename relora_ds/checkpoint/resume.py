"""Deciding what a run continues from, and whether it may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from relora_ds.checkpoint.store import (
    TrainerState,
    find_checkpoint,
    latest_checkpoint,
    read_trainer_state,
)
from relora_ds.config.reading.source import read_yaml
from relora_ds.config.schema import RunConfig
from relora_ds.errors import CheckpointError, ConfigError

# Neither the trained function nor the order of the data depends on these.
_FREE = (
    "output_dir",
    "eval",
    "checkpoint",
    "log",
    "deepspeed",
    "model",
    "data.cache_dir",
    "data.train",
    "data.valid",
    "data.tokenizer",
    "train.micro_batch_size",
    "train.attention",
    "train.activation_checkpointing",
    "train.digest_every",
    "train.timeout_minutes",
    "train.init_from",
    "parallel",
)


def choose_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that `checkpoint.resume` asks for, or None for a fresh start.

    Raises:
        CheckpointError: it asks for one that does not exist.
    """
    resume = config.checkpoint.resume
    directory = Path(config.output_dir) / "checkpoints"
    if resume is False:
        return None
    if resume == "auto":
        return latest_checkpoint(directory)
    if resume is True:
        found = latest_checkpoint(directory)
        if found is None:
            raise CheckpointError(
                f"checkpoint.resume is true, but {directory} holds no checkpoint; use "
                "checkpoint.resume=auto to start from the beginning if there is none"
            )
        return found
    return find_checkpoint(Path(resume))


def set_aside_earlier_run(output_dir: Path) -> Path | None:
    """Move an earlier run's results to `previous_N`, so that a fresh start loses nothing."""
    results = ("checkpoints", "metrics.jsonl", "summary.json", "run.yaml", "plots", "hf", "logs")
    found = [output_dir / name for name in results if (output_dir / name).exists()]
    if not any(path.name in ("checkpoints", "metrics.jsonl") for path in found):
        return None
    number = 1
    while (output_dir / f"previous_{number}").exists():
        number += 1
    target = output_dir / f"previous_{number}"
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    return target


def check_resume(
    checkpoint: Path,
    config: RunConfig,
    architecture: Mapping[str, Any],
    data: list[str],
) -> TrainerState:
    """The state to resume, after making sure that it belongs to this run.

    Args:
        architecture: the run's model configuration as plain values.
        data: fingerprints of the run's token files.

    Raises:
        CheckpointError: something that the trained function depends on differs; every difference is
            listed as `key: checkpoint X, run Y`.
    """
    state = read_trainer_state(checkpoint)
    saved = dict(_flat(_read(checkpoint / "run.yaml")))
    saved |= dict(_flat(_read(checkpoint / "model.json"), "architecture."))
    now = dict(_flat(config.model_dump(mode="json")))
    now |= dict(_flat(architecture, "architecture."))
    saved["token files"], now["token files"] = state.data, data
    allowed = (*_FREE, *config.checkpoint.allow_change)
    differences = [
        f"  {key}: checkpoint {saved.get(key)!r}, run {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and not _covered(key, allowed)
    ]
    if differences:
        raise CheckpointError(
            f"{checkpoint}: belongs to a run that differs in\n"
            + "\n".join(differences)
            + "\nrestore these values, start anew with checkpoint.resume=false, or allow a change "
            "with checkpoint.allow_change"
        )
    return state


def _covered(key: str, allowed: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(path: Path) -> dict[str, Any]:
    try:
        document = read_yaml(path)  # JSON is YAML
    except ConfigError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); resume from another") from error
    return document.data
