"""One run from its description to its results, top to bottom."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from relora_ds.accounting.recorder import recorder
from relora_ds.activity import at_step, doing
from relora_ds.checkpoint.changes import check_resume
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.record import GuardState
from relora_ds.checkpoint.resume import (
    find_saved_run,
    set_aside_earlier_run,
)
from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.checkpoint.saving.store import CheckpointStore
from relora_ds.config.load import LoadedRun, check_processes, dump_run_config
from relora_ds.data.batches import TrainingBatches
from relora_ds.data.source import open_corpus
from relora_ds.data.verify import verify_contents
from relora_ds.engine import distributed
from relora_ds.engine.accelerator import describe_machine
from relora_ds.engine.deepspeed.config import (
    islands_advice,
    reduction_advice,
    resolve_deepspeed_config,
)
from relora_ds.engine.deepspeed.version import version_advice
from relora_ds.engine.device import set_arithmetic
from relora_ds.errors import (
    ConfigError,
    DivergenceError,
    PreemptedError,
    ReloraError,
)
from relora_ds.methods.registry import check_requirements, plan_phases
from relora_ds.model.attention import check_attention
from relora_ds.model.mlp import is_padded
from relora_ds.numerics.compiled import check_compiler
from relora_ds.parallel.topology import as_one_island, share_models
from relora_ds.train.checks import (
    begun_with,
    doubt_about_the_resume,
    doubts_about_the_export,
    initial_model,
)
from relora_ds.train.evaluate import validation_batches
from relora_ds.train.guards.agreement import Agreement
from relora_ds.train.guards.bad_batches import BadBatches
from relora_ds.train.guards.steps import StepGuard
from relora_ds.train.lifetime.lifetime import Lifetime
from relora_ds.train.lifetime.stop import StopSignal
from relora_ds.train.loop import Trainer
from relora_ds.train.phases import Prepared, train
from relora_ds.train.results import (
    Outcome,
    are_complete,
    check_export_target,
    earlier_figures,
    recover_results,
    warn_of_missing_export,
    write_results,
)
from relora_ds.train.telemetry.atomic import write_atomically
from relora_ds.train.telemetry.logs import configure_logging
from relora_ds.train.telemetry.telemetry import Telemetry
from relora_ds.train.telemetry.trace import TRACES, StepTrace

_logger = logging.getLogger(__name__)


def run(loaded: LoadedRun, lifetime: Lifetime) -> None:
    """Train, evaluate, checkpoint and export what the run file describes.

    Args:
        loaded: the run.
        lifetime: of this process; a failure is reported there before anything is cleaned up.

    Raises:
        ReloraError: see the classes in `errors`; each has its exit code.
    """
    started_at = datetime.now(UTC)
    with doing("start"):
        prepared = _prepare(loaded, lifetime)
    with doing("resume"):
        prepared, saved = _find_start(prepared)
    if saved is not None and saved.record.trainer.step >= loaded.config.train.steps:
        _finish_again(prepared, saved, started_at)
        return
    with doing("start"):
        trainer = _build_trainer(prepared, saved, StopSignal(lifetime.requests))
        _announce(loaded, prepared)
    status, reason = "failed", None
    try:
        with recorder:
            train(prepared, trainer, saved)
        status = "completed"
    except PreemptedError as error:
        status, reason = "preempted", str(error)
        raise
    except BaseException as error:
        reason = lifetime.report(error)  # first of all: what follows may fail or hang
        status = "diverged" if isinstance(error, DivergenceError) else "failed"
        if isinstance(error, DivergenceError):
            trainer.checkpoints.settle()  # of a step before; all ranks are here
        raise
    finally:
        at_step(None)
        outcome = Outcome(status, reason, started_at, prepared.topology.world_size, trainer.final)
        problems = _write_results(prepared, trainer, outcome)
        if problems:
            lifetime.say_again()
        if status in ("completed", "preempted"):
            # a launcher ends the other ranks when one has left: nobody leaves before all are done
            distributed.barrier()
    if problems:
        raise problems[0]


def _write_results(prepared: Prepared, trainer: Trainer, outcome: Outcome) -> list[ReloraError]:
    """Close what shows the run and write its results on the main process.

    Returns:
        What went wrong with that; each is in the log, and none hides why the run ended.
    """
    problems: list[ReloraError] = []
    with doing("results"):
        try:
            trainer.telemetry.close(outcome.status)
        except ReloraError as error:
            problems.append(error)
        if prepared.topology.is_main:
            data = prepared.corpus, trainer.valid_data
            problems += write_results(outcome, prepared.config, *data)
    for problem in problems:
        _logger.error("results: %s", problem)
    return problems


def _finish_again(prepared: Prepared, saved: SavedRun, started_at: datetime) -> None:
    """Leave a run alone that has no step left; write results that an earlier process did not.

    Raises:
        ReloraError: they cannot be written.
    """
    config, problems = prepared.config, []
    if prepared.topology.is_main and are_complete(config):
        _logger.info(
            "%s is complete after %d steps: nothing is left to do; checkpoint.resume=false starts "
            "it anew",
            config.output_dir,
            saved.record.trainer.step,
        )
    elif prepared.topology.is_main:
        figures = earlier_figures(Path(config.output_dir))
        size = prepared.topology.world_size
        outcome = Outcome("completed", None, started_at, size, figures)
        with doing("results"):
            problems = write_results(outcome, config, prepared.corpus, prepared.valid_data)
    distributed.barrier()
    if problems:
        raise problems[0]


def _prepare(loaded: LoadedRun, lifetime: Lifetime) -> Prepared:
    """Join the other processes, and make sure that settings, processes and data fit each other."""
    set_arithmetic(loaded.config.train)
    timeout_minutes = loaded.config.train.timeout_minutes
    topology = distributed.start(timeout_minutes)
    lifetime.watch_peers(topology.world_size, timeout_minutes)
    topology = share_models(topology, loaded.config)
    tp, islands = topology.tp, topology.islands
    groups = [
        ("tp", tp.group),
        ("dp", tp.data_group),
        ("islands", islands.group),
        ("islands", islands.background),
        ("island", islands.local),
    ]
    for name, group in groups:
        if group is not None:
            recorder.name_group(group, name)
    output_dir = Path(loaded.config.output_dir)
    earlier_run = lifetime.hold(output_dir)
    configure_logging(output_dir, topology.rank)
    if earlier_run is not None:
        _logger.warning(earlier_run)
    check_processes(loaded, topology.data_size)
    share = as_one_island(loaded.config)
    zero = resolve_deepspeed_config(share.deepspeed, share, topology.dp_size)
    check_requirements(loaded, zero)
    masks = loaded.config.data.document_mask
    check_attention(loaded.config.train, loaded.architecture, topology.device, masks)
    if loaded.config.train.compile:
        check_compiler(topology.device)
    with doing("corpus"):
        corpus = open_corpus(loaded.config.data)
    with doing("verify the data"):
        whole = loaded.config.data.verify == "whole"
        verify_contents(corpus.files, topology.rank, distributed.gather_objects, whole=whole)
        corpus.check_vocabulary(loaded.architecture.vocab_size)
        corpus.check_length(loaded.config.train.seq_length)
        place = topology.data_rank, topology.data_size
        valid_data = validation_batches(loaded.config, corpus, *place)
    return Prepared(loaded.config, loaded.architecture, topology, zero, corpus, valid_data)


def _announce(loaded: LoadedRun, prepared: Prepared) -> None:
    """Say on the main process what a user should know before training, and write `run.yaml`."""
    if not prepared.topology.is_main:
        return
    _logger.info("running on %s", describe_machine(prepared.topology.device))
    warn_of_missing_export(loaded.config)
    islands = islands_advice(prepared.zero, loaded.config.parallel.islands)
    advice = reduction_advice(prepared.zero), islands, version_advice()
    doubts = doubts_about_the_export(prepared.architecture, prepared.corpus)
    for warning in (*loaded.warnings, *advice, *doubts):
        if warning is not None:
            _logger.warning(warning)
    path = Path(loaded.config.output_dir) / "run.yaml"
    try:
        write_atomically(path, dump_run_config(loaded.config).encode())
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; choose an output_dir that can be written"
        ) from error


def _find_start(prepared: Prepared) -> tuple[Prepared, SavedRun | None]:
    """The checkpoint to resume from, which belongs to this run, or a clean output directory.

    Returns:
        The run, which names what it begins with, and the checkpoint.
    """
    config, topology = prepared.config, prepared.topology
    if topology.is_main:
        recover_results(config)  # before the results of an earlier run are moved aside
    saved = find_saved_run(config, topology.is_main)
    if saved is not None and saved.is_import:
        config, saved = begun_with(saved, config, prepared.architecture), None
        prepared = replace(prepared, config=config)
    if saved is not None:
        _check_export_target(prepared)
        fingerprints = prepared.corpus.fingerprints(like=saved.record.trainer.data_fingerprints)
        check_resume(saved, config, prepared.architecture, fingerprints)
        _logger.info("resuming from %s", saved.checkpoint)
        train, device = config.train, topology.device
        padded = is_padded(prepared.architecture, train, device.type, config.parallel.tensor)
        doubt = None
        if topology.is_main:
            doubt = doubt_about_the_resume(saved, device, bool(train.compile), padded)
        if doubt is not None:
            _logger.warning(doubt)
        return prepared, saved
    # before results of an earlier run make way for a start that fails
    initial_model(config, prepared.architecture, prepared.corpus)
    output_dir = Path(config.output_dir)
    if topology.is_main:
        moved = set_aside_earlier_run(output_dir, config)
        configure_logging(output_dir, topology.rank)
        if moved is not None:
            _logger.info("moved the earlier run's results to %s", moved)
        source = config.train.init_from
        what = "no checkpoint to resume from" if source is None else f"weights of {source}"
        _logger.info("%s: starting at step 0", what)
    distributed.barrier()
    if not topology.is_main:
        configure_logging(output_dir, topology.rank)
    _check_export_target(prepared)
    return prepared, None


def _check_export_target(prepared: Prepared) -> None:
    """Make sure on all processes that the export will have a place; the main one looks.

    Raises:
        ConfigError: `hf/` holds something else.
    """
    problem = None
    if prepared.topology.is_main:
        try:
            check_export_target(prepared.config)
        except ConfigError as error:
            problem = str(error)
    problem = distributed.broadcast_object(problem)
    if problem is not None:
        raise ConfigError(problem)


def _build_trainer(prepared: Prepared, saved: SavedRun | None, stop: StopSignal) -> Trainer:
    config, train, corpus = prepared.config, prepared.config.train, prepared.corpus
    topology = prepared.topology
    state = saved.record.trainer if saved else None
    output_dir = Path(config.output_dir)
    place = (train.micro_batch_size, topology.data_rank, topology.data_size)
    train_data = TrainingBatches(
        corpus.training,
        corpus.weights,
        train.seq_length,
        train.global_batch_size,
        *place,
        train.seed,
    )
    telemetry = Telemetry(
        config,
        output_dir,
        total_steps=train.steps,
        resume_step=state.step if state else 0,
        wandb_run_id=state.telemetry.get("wandb_run_id") if state else None,
        is_main=topology.is_main,
    )
    bad_batches = BadBatches(
        output_dir / "logs" / "bad_batches.jsonl", train_data, topology.is_main
    )
    guards = state.guards if state else GuardState()
    checkpoints = CheckpointStore(
        output_dir / layout.CHECKPOINTS,
        config.checkpoint,
        topology,
        plan_phases(config)[-1].last_stable_step,
    )
    return Trainer(
        config=config,
        architecture=prepared.architecture,
        topology=topology,
        zero_stage=prepared.zero.stage,
        corpus=corpus,
        train_data=train_data,
        valid_data=prepared.valid_data,
        telemetry=telemetry,
        checkpoints=checkpoints,
        stop=stop,
        agreement=Agreement(topology.islands, config.islands.every, config.islands.in_turn),
        guard=StepGuard(config.guards, guards, bad_batches.note),
        trace=StepTrace(config.log.profile, output_dir / TRACES, topology.rank),
        final=earlier_figures(output_dir) if saved and topology.is_main else {},
    )
