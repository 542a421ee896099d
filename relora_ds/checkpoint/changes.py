"""What a run may change when it goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.config.free import covers, flat_settings, free_keys
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.errors import CheckpointError
from relora_ds.methods.registry import Phase, plan_phases

_TOKEN_FILES = "token files"
_COURSE = frozenset({"train.steps", "schedule"})
_VALUE = 60  # characters of a value in a message
_NAMED = 5  # keys in the first line of a message


def check_resume(
    saved: SavedRun, config: RunConfig, architecture: ModelConfig, fingerprints: Sequence[str]
) -> None:
    """Make sure that a checkpoint belongs to a run.

    Settings are compared with defaults filled in: one that was added after the checkpoint was
    written counts as its default there. The length of the run and its schedule may change as long
    as every update so far would have been the same: a run goes on from its stable phase as if it
    had been longer from the beginning.

    Args:
        fingerprints: of the run's token files.

    Raises:
        CheckpointError: something that the trained function depends on differs, every difference is
            listed as `key: checkpoint X, run Y`; or what is permitted to differ lies behind.
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
    if _is_longer_run(differing) and _same_so_far(record.config, config, record.trainer.step):
        differing = [found for found in differing if not covers(_COURSE, found[0])]
    if differing:
        keys = ", ".join(key for key, _, _ in differing if key in before and key != _TOKEN_FILES)
        raise CheckpointError(
            f"{saved.checkpoint}: belongs to a run that differs in {_names(differing)}:\n"
            + _table(differing)
            + f"\n{_stable_phase(saved, differing)}restore these values, start anew with "
            f"checkpoint.resume=false, or allow this with checkpoint.allow_change=[{keys}]"
        )
    _check_course(saved, config)


def phase_of(saved: SavedRun, config: RunConfig) -> Phase:
    """The phase of a run that a checkpoint is of.

    Raises:
        CheckpointError: the run has no phase of that name, as after a permitted change.
    """
    phases, current = plan_phases(config), saved.record.trainer.phase
    for phase in phases:
        if phase.name == current:
            return phase
    raise CheckpointError(
        f"{saved.checkpoint}: was saved in the phase {current!r}, but the run has "
        f"{' and '.join(phase.name for phase in phases)} only; restore the method's settings"
    )


def _check_course(saved: SavedRun, config: RunConfig) -> None:
    """Make sure that a permitted change leaves the way to the checkpoint as it was.

    Raises:
        CheckpointError: a phase that is over would have ended elsewhere, or the one that goes on
            would be over.
    """
    before, now = (phase_of(saved, each) for each in (saved.record.config, config))
    step = saved.record.trainer.step
    is_over = now.last_step < min(step, config.train.steps)
    if before.first_step == now.first_step and not is_over:
        return
    raise CheckpointError(
        f"{saved.checkpoint}: is of step {step} in the phase {now.name!r} of the steps "
        f"{before.first_step + 1} to {before.last_step}, but the run has that phase in the steps "
        f"{now.first_step + 1} to {now.last_step}: what lies behind a checkpoint cannot be changed;"
        " restore method.warm_start_steps"
    )


def _is_longer_run(differing: Sequence[tuple[str, Any, Any]]) -> bool:
    return any(covers(_COURSE, key) for key, _, _ in differing)


def _same_so_far(before: RunConfig, now: RunConfig, step: int) -> bool:
    """Whether the first `step` updates of two runs have the same learning rates and events."""
    if before.method.name != now.method.name or before.method.warm_start != now.method.warm_start:
        return False
    same_length = before.train.steps == now.train.steps
    for one, other in zip(plan_phases(before), plan_phases(now), strict=True):
        taken = min(step - one.first_step, one.steps)
        if taken > 0 and other.method.events_depend_on_steps and not same_length:
            return False
        for update in range(taken):
            rate = one.method.lr_multiplier(update, one.schedule)
            if rate != other.method.lr_multiplier(update, other.schedule):
                return False
    return True


def _stable_phase(saved: SavedRun, differing: Sequence[tuple[str, Any, Any]]) -> str:
    """Where a run whose rate has begun to decay can go on from, if that may be what is meant."""
    step = plan_phases(saved.record.config)[-1].last_stable_step
    if step is None or step >= saved.record.trainer.step or not _is_longer_run(differing):
        return ""
    stable = saved.checkpoint.with_name(layout.checkpoint(step))
    return f"go on from the stable phase with checkpoint.resume={stable}, " * stable.is_dir()


def _names(differing: Sequence[tuple[str, Any, Any]]) -> str:
    """The keys for a line that is read alone: the first few, and how many more there are."""
    keys = [key for key, _, _ in differing]
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more


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
