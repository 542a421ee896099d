"""What a run continues from, whether it may, and how its state comes back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from relora_ds.checkpoint.changes import phase_of
from relora_ds.checkpoint.find import (
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
)
from relora_ds.checkpoint.find import (
    remedy as other_checkpoint,
)
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import Listed
from relora_ds.checkpoint.format.record import RunRecord
from relora_ds.checkpoint.format.tensors import read_tensors
from relora_ds.checkpoint.format.verify import shares, verify_description, verify_files
from relora_ds.checkpoint.restore import (
    check_moments,
    load_round_tensors,
    load_side_tensors,
    load_state,
    side_slices,
)
from relora_ds.checkpoint.saved_run import SavedRun, fitting
from relora_ds.checkpoint.saved_state import SavedState, is_written_state
from relora_ds.checkpoint.saving.recovery import recover
from relora_ds.checkpoint.saving.retention import unused_previous
from relora_ds.checkpoint.tp_state import PartOfState
from relora_ds.config.load import dump_run_config
from relora_ds.config.schema import RunConfig
from relora_ds.engine.distributed import (
    broadcast_object,
    gather_objects,
    lost_peers,
    rank,
    world_size,
)
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import CheckpointError, ReloraError
from relora_ds.files.durable import describe, remedy
from relora_ds.files.regular import read_regular
from relora_ds.methods.interface import Session
from relora_ds.methods.registry import Phase, plan_phases
from relora_ds.parallel.topology import Topology

_logger = logging.getLogger(__name__)
_DESCRIPTION_BYTES = 64 << 20
_REASON = 300  # characters of a library's own words


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
        except CheckpointError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{describe(error)}, which a killed save left; {remedy(error)}"
    problem, checkpoint = broadcast_object((problem, checkpoint))
    if problem is not None:
        raise CheckpointError(problem)
    if checkpoint is None:
        return None
    record, problem = verified_by_all(checkpoint, is_main)
    if record is not None:
        return SavedRun(checkpoint, record)
    return _older_run(checkpoint, config, is_main, problem)


def verified_by_all(checkpoint: Path, is_main: bool) -> tuple[RunRecord | None, str]:
    """Check a checkpoint, each process a share of its files. A collective call.

    Returns:
        What it says of itself, or None and what is wrong with it; the same on every rank.
    """
    problem = ""
    described: tuple[RunRecord, dict[str, Listed]] | None = None
    if is_main:
        try:
            described = verify_description(checkpoint)
        except Exception as error:  # the others wait for a verdict
            problem = _in_words(checkpoint, error)
    described, problem = broadcast_object((described, problem))
    if described is None:
        return None, problem
    record, listed = described
    own = shares(listed, world_size())[rank()]
    try:
        if own:
            verify_files(checkpoint, record, listed, own)
    except Exception as error:
        problem = _in_words(checkpoint, error)
    found = [each for each in gather_objects(problem) if each]
    return (None, found[0]) if found else (record, "")


def _older_run(checkpoint: Path, config: RunConfig, is_main: bool, problem: str) -> SavedRun:
    """The newest whole checkpoint before a damaged one, if the run may take it.

    Raises:
        CheckpointError: it may not, or there is none; says what is wrong and what is left.
    """
    step = layout.step_of(checkpoint.name)
    found = None if step is None else find_earlier(checkpoint.parent, step - 1, is_main)
    if found is None:
        raise CheckpointError(f"{problem}; {other_checkpoint([])}")
    # a run that asks for a certain checkpoint gets no other one
    if not config.checkpoint.fallback or config.checkpoint.resume not in ("auto", True):
        raise CheckpointError(f"{problem}; {other_checkpoint([found.checkpoint])}")
    if is_main:
        _logger.warning("%s; taking %s in its place", problem, found.checkpoint)
    return found


def find_earlier(directory: Path, step: int, is_main: bool) -> SavedRun | None:
    """The newest verified checkpoint of at most `step` updates; None if there is none.

    A collective call, like `find_saved_run`.
    """
    complete = list_checkpoints(directory) if is_main else []
    found = [path for path in reversed(complete) if (layout.step_of(path.name) or 0) <= step]
    for checkpoint in broadcast_object(found):
        record, problem = verified_by_all(checkpoint, is_main)
        if record is not None:
            return SavedRun(checkpoint, record)
        if is_main:
            _logger.warning("passed over: %s", problem)
    return None


def choose_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that `checkpoint.resume` asks for, or None for a fresh start.

    Raises:
        CheckpointError: it asks for one that does not exist.
    """
    resume = config.checkpoint.resume
    directory = Path(config.output_dir) / layout.CHECKPOINTS
    if resume is False:
        return None
    if resume in ("auto", True):
        found = _newest(directory, config.checkpoint.fallback)
        if found is None and resume is True:
            raise CheckpointError(
                f"checkpoint.resume is true, but {directory} holds no checkpoint; use "
                "checkpoint.resume=auto to start from the beginning if there is none"
            )
        return found
    return find_checkpoint(Path(resume))


def _newest(directory: Path, fallback: bool) -> Path | None:
    try:
        return latest_checkpoint(directory)
    except CheckpointError as error:
        complete = list_checkpoints(directory)
        if not fallback or not complete:
            raise
        _logger.warning("%s; taking %s", error, complete[-1])
        return complete[-1]


def set_aside_earlier_run(output_dir: Path, config: RunConfig) -> Path | None:
    """Move an earlier run's results to `previous_N`, so that a fresh start loses nothing.

    A start of the same run that ended before it had a checkpoint or an export is no earlier run:
    its steps happen again and write the same lines, as those behind a checkpoint do. A run that is
    killed and started again and again leaves no folder each time.

    Args:
        config: of the run that starts.

    Returns:
        Where the results are now; None if they stay, or if there are none.

    Raises:
        OSError: they cannot be moved.
    """
    kept = (layout.CHECKPOINTS, "metrics.jsonl")
    results = (*kept, "summary.json", "run.yaml", "plots", "hf", "logs")
    found = [output_dir / name for name in results if (output_dir / name).exists()]
    if not any(path.name in kept for path in found) or _is_a_try_of(output_dir, config):
        return None
    target = unused_previous(output_dir)
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    return target


def _is_a_try_of(output_dir: Path, config: RunConfig) -> bool:
    """Whether what is there is of a run of the same description, and its steps are all there is."""
    checkpoints, metrics = output_dir / layout.CHECKPOINTS, output_dir / "metrics.jsonl"
    if (output_dir / "hf").exists() or any(checkpoints.glob("[!.]*")):
        return False
    if not metrics.exists() or not metrics.stat().st_size:
        return True
    try:
        before = read_regular(output_dir / "run.yaml", _DESCRIPTION_BYTES)
    except OSError:
        return False
    return before == dump_run_config(config).encode()


def phases_left(config: RunConfig, saved: SavedRun | None) -> list[Phase]:
    """The phases that a run still has to go through, the one that a checkpoint is of first.

    Raises:
        CheckpointError: the run has no phase of that name, as after a permitted change.
    """
    phases = plan_phases(config)
    if saved is None:
        return phases
    current = phase_of(saved, config).name
    return phases[[phase.name for phase in phases].index(current) :]


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
        CheckpointError: on every rank, in the same words: a file cannot be read on one of them, or
            the optimizer's or the method's state does not fit.
    """
    problem = ""
    try:
        _restore(saved, engine, session, topology, stage)
    except Exception as error:  # whatever it is, all ranks must hear of it
        if isinstance(error, RuntimeError) and lost_peers(error):
            raise
        problem = _in_words(saved.checkpoint, error)
    # also since one process of a node may restore what all of them read
    found = gather_objects(problem)
    if any(found):
        first = next(number for number, each in enumerate(found) if each)
        who = "" if all(found) else f"rank {first}: "
        raise CheckpointError(f"{who}{found[first]}")


def _restore(
    saved: SavedRun,
    engine: TrainEngine,
    session: Session[Any],
    topology: Topology,
    stage: int,
) -> None:
    """This rank's part of `restore_phase`."""
    other = state_of_other_topology(saved, topology, stage)
    with fitting(saved.checkpoint, "its weights and optimizer states"):
        if other is None:
            _load_as_written(saved.checkpoint, engine, topology)
            saved.check_updates(engine.completed_steps())
            check_moments(engine)
        else:
            _refuse_rounds(saved, engine)
            load_state(engine, other)
    own = saved.own_method_state(topology.tp)
    with fitting(saved.checkpoint, "the entries of its method's state"):
        session.load_state_dict(own)


def _in_words(checkpoint: Path, error: Exception) -> str:
    """Why a checkpoint cannot be used, in one line for all ranks."""
    if isinstance(error, ReloraError):
        return str(error)
    if isinstance(error, OSError):
        return f"{checkpoint}: {describe(error)}; {remedy(error)}"
    reason = " ".join(str(error).split())[:_REASON]
    return (
        f"{checkpoint}: cannot be read ({type(error).__name__}: {reason}); use another checkpoint"
    )


def _load_as_written(checkpoint: Path, engine: TrainEngine, topology: Topology) -> None:
    engine.load(str(checkpoint.parent), checkpoint.name)
    side = read_tensors(checkpoint / layout.side(topology.tp.suffix))
    if side_slices(engine):
        side |= read_tensors(checkpoint / layout.side_of_rank(topology.island_rank))
    load_side_tensors(engine, side)
    if engine.rounds is not None:
        _load_rounds(checkpoint, engine, topology)


def _refuse_rounds(saved: SavedRun, engine: TrainEngine) -> None:
    """Raise where moments of several islands would have to be put together and cut anew."""
    config, islands = saved.record.config, saved.record.config.islands
    apart = not islands.share_gradients and saved.record.trainer.step > islands.from_step
    if engine.rounds is not None and config.parallel.islands > 1 and apart:
        raise CheckpointError(
            f"{saved.checkpoint}: its islands have moments of their own, which are continued with "
            "as many processes per island, the same parallel.tensor and ZeRO stage only: restore "
            "these, or go on with parallel.islands=1 and islands.every=1 from the moments of the "
            "first island"
        )


def _load_rounds(checkpoint: Path, engine: TrainEngine, topology: Topology) -> None:
    """What islands hold apart; an island that was not there before begins as the first one."""
    place, size = topology.island_rank, topology.world_size // topology.islands.size
    if engine.layout.partition_group is None:  # one copy of the model has written for all
        place %= topology.tp.size
    found = []
    for island in (0, topology.islands.rank):
        file = checkpoint / layout.round_of_rank(place + size * island)
        found.append(read_tensors(file) if file.is_file() else None)
    load_round_tensors(engine, found[0] or {}, found[1])
