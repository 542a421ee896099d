"""What a run continues from, whether it may, and how its state comes back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import verify_manifest
from relora_ds.checkpoint.format.record import read_record
from relora_ds.checkpoint.format.tensors import read_tensors
from relora_ds.checkpoint.restore import load_side_tensors, load_state, side_slices
from relora_ds.checkpoint.saved_run import SavedRun, fitting
from relora_ds.checkpoint.saved_state import SavedState, is_written_state
from relora_ds.checkpoint.saving.recovery import recover
from relora_ds.checkpoint.saving.retention import unused_previous
from relora_ds.checkpoint.store import find_checkpoint, latest_checkpoint, list_checkpoints
from relora_ds.checkpoint.tp_state import PartOfState
from relora_ds.config.free import free_keys
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine.distributed import barrier, broadcast_object
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import CheckpointError
from relora_ds.files.durable import describe, remedy
from relora_ds.methods.interface import Session
from relora_ds.methods.registry import Phase, plan_phases
from relora_ds.parallel.topology import Topology

_logger = logging.getLogger(__name__)


def find_saved_run(config: RunConfig, is_main: bool) -> SavedRun | None:
    """The verified checkpoint that a run is to continue, or None for a fresh start.

    A collective call: the main process looks at the disk once, because ranks must not disagree.

    Raises:
        CheckpointError: on every rank: the checkpoint that is asked for does not exist, is not what
            was written, or cannot be read by this version.
    """
    problem, checkpoint = None, None
    if is_main:
        try:
            recover(Path(config.output_dir) / layout.CHECKPOINTS)
            checkpoint = choose_checkpoint(config)
            if checkpoint is not None:
                verify_manifest(checkpoint)
        except CheckpointError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{describe(error)}, which a killed save left; {remedy(error)}"
    problem, checkpoint = broadcast_object((problem, checkpoint))
    if problem is not None:
        raise CheckpointError(problem)
    return None if checkpoint is None else SavedRun(checkpoint)


def find_earlier(directory: Path, step: int, is_main: bool) -> SavedRun | None:
    """The newest verified checkpoint of at most `step` updates; None if there is none.

    A collective call, like `find_saved_run`.
    """
    found = None
    for checkpoint in reversed(list_checkpoints(directory)) if is_main else ():
        try:
            verify_manifest(checkpoint)
            if read_record(checkpoint).trainer.step <= step:
                found = checkpoint
                break
        except CheckpointError as error:
            _logger.warning("passed over: %s", error)
    found = broadcast_object(found)
    return None if found is None else SavedRun(found)


def choose_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that `checkpoint.resume` asks for, or None for a fresh start.

    Raises:
        CheckpointError: it asks for one that does not exist.
    """
    resume = config.checkpoint.resume
    directory = Path(config.output_dir) / layout.CHECKPOINTS
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
    kept = (layout.CHECKPOINTS, "metrics.jsonl")
    results = (*kept, "summary.json", "run.yaml", "plots", "hf", "logs")
    found = [output_dir / name for name in results if (output_dir / name).exists()]
    if not any(path.name in kept for path in found):
        return None
    target = unused_previous(output_dir)
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    return target


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
    differences = [
        f"  {key}: checkpoint {before.get(key)!r}, run {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _covered(key, allowed)
    ]
    if differences:
        raise CheckpointError(
            f"{saved.checkpoint}: belongs to a run that differs in\n"
            + "\n".join(differences)
            + "\nrestore these values, start anew with checkpoint.resume=false, or allow a change "
            "with checkpoint.allow_change"
        )


def phases_left(config: RunConfig, saved: SavedRun | None) -> list[Phase]:
    """The phases that a run still has to go through, the one that a checkpoint is of first.

    Raises:
        CheckpointError: the run has no phase of that name, as after a permitted change.
    """
    phases = plan_phases(config)
    if saved is None:
        return phases
    names, current = [phase.name for phase in phases], saved.record.trainer.phase
    if current not in names:
        raise CheckpointError(
            f"{saved.checkpoint}: was saved in the phase {current!r}, but the run has "
            f"{' and '.join(names)} only; restore the method's settings"
        )
    return phases[names.index(current) :]


def state_of_other_topology(saved: SavedRun, topology: Topology, stage: int) -> SavedState | None:
    """This tensor-parallel rank's part of a saved state by name.

    Args:
        stage: the ZeRO stage at which the run continues.

    Returns:
        None if the rank can read the files as they are.
    """
    state, tp = saved.record.trainer, topology.tp
    before = state.dp_size, state.tp_size, state.zero_stage
    now = topology.dp_size, tp.size, stage
    alike = before == now and saved.is_sharded_like(tp)
    if alike and not is_written_state(saved.checkpoint):
        return None
    _logger.info(
        "written by %d x %d processes (data x tensor) at ZeRO stage %d, "
        "continued by %d x %d at stage %d",
        *before,
        *now,
    )
    whole = saved.state()
    return whole if tp.size == 1 else PartOfState(whole, saved.shards(tp))


def restore_phase(
    saved: SavedRun,
    engine: TrainEngine,
    session: Session[Any],
    topology: Topology,
    stage: int,
) -> None:
    """Bring a fresh engine and the method at work on it to the state of a checkpoint.

    A collective call.

    Args:
        engine: of the phase that the checkpoint was saved in.
        stage: the engine's ZeRO stage.

    Raises:
        CheckpointError: the optimizer's or the method's state does not fit.
    """
    other = state_of_other_topology(saved, topology, stage)
    with fitting(saved.checkpoint, "its weights and optimizer states"):
        if other is None:
            _load_as_written(saved.checkpoint, engine, topology)
        else:
            load_state(engine, other)
    own = saved.own_method_state(topology.tp)
    with fitting(saved.checkpoint, "the entries of its method's state"):
        session.load_state_dict(own)
    barrier()  # one process of a node may restore what all of them read


def _load_as_written(checkpoint: Path, engine: TrainEngine, topology: Topology) -> None:
    engine.load(str(checkpoint.parent), checkpoint.name)
    side = read_tensors(checkpoint / layout.side(topology.tp.suffix))
    if side_slices(engine):
        side |= read_tensors(checkpoint / layout.side_of_rank(topology.rank))
    load_side_tensors(engine, side)


def _settings(
    config: RunConfig, architecture: ModelConfig, fingerprints: Sequence[str]
) -> dict[str, Any]:
    """Everything that two runs may differ in, by dotted key, as plain values."""
    flat = dict(_flat(config.model_dump(mode="json")))
    flat |= _flat(architecture.model_dump(mode="json"), "architecture.")
    return flat | {"token files": list(fingerprints)}


def _covered(key: str, allowed: frozenset[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
