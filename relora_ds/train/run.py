"""One run from its description to its results, top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from relora_ds.accounting.flops import flops_per_token, parameter_counts
from relora_ds.accounting.recorder import recorder
from relora_ds.activity import at_step, doing
from relora_ds.checkpoint.export import DenseModel
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.resume import (
    check_resume,
    find_saved_run,
    phases_left,
    restore_phase,
    set_aside_earlier_run,
)
from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.checkpoint.saving.store import CheckpointStore
from relora_ds.config.load import LoadedRun, check_processes, dump_run_config
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.data.batches import TrainingBatches, ValidationBatches
from relora_ds.data.source import Corpus, open_corpus
from relora_ds.data.verify import verify_contents
from relora_ds.engine import distributed
from relora_ds.engine.accelerator import describe_machine
from relora_ds.engine.assemble import AwaitedState, DenseWeights, build_engine
from relora_ds.engine.deepspeed.config import reduction_advice, resolve_deepspeed_config
from relora_ds.engine.deepspeed.version import version_advice
from relora_ds.engine.device import set_arithmetic
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import CheckpointError, DivergenceError, PreemptedError
from relora_ds.methods.registry import Phase, check_requirements
from relora_ds.model.attention import check_attention
from relora_ds.parallel.topology import Topology, share_models
from relora_ds.parallel.zero import ZeroSettings
from relora_ds.planning.memory_report import (
    closed_form,
    memory_metrics,
    saved_bytes,
    storage_plan,
)
from relora_ds.train.lifetime.lifetime import Lifetime
from relora_ds.train.lifetime.stop import StopSignal
from relora_ds.train.loop import Trainer
from relora_ds.train.results import Outcome, warn_of_missing_export, write_results
from relora_ds.train.telemetry.logs import configure_logging
from relora_ds.train.telemetry.meter import ThroughputMeter
from relora_ds.train.telemetry.peak import peak_flops
from relora_ds.train.telemetry.telemetry import Telemetry
from relora_ds.train.transition import take_dense_weights

_logger = logging.getLogger(__name__)
_PROBE_TOKENS = 128


@dataclass(frozen=True)
class Prepared:
    """A run whose settings, processes and data fit each other."""

    config: RunConfig
    architecture: ModelConfig
    topology: Topology
    zero: ZeroSettings
    corpus: Corpus


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
        saved = _find_start(prepared)
    with doing("start"):
        trainer = _build_trainer(prepared, saved, StopSignal(lifetime.requests))
        _announce(loaded, prepared)
    topology = prepared.topology
    status, reason = "failed", None
    try:
        with recorder:
            _train(prepared, trainer, saved)
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
        trainer.telemetry.close(status)
        if topology.is_main:
            outcome = Outcome(status, reason, started_at, topology.world_size, trainer.final)
            with doing("results"):
                write_results(outcome, loaded.config, prepared.corpus, trainer.valid_data)
        if status in ("completed", "preempted"):
            # a launcher ends the other ranks when one has left: nobody leaves before all are done
            distributed.barrier()


def _prepare(loaded: LoadedRun, lifetime: Lifetime) -> Prepared:
    """Join the other processes, and make sure that settings, processes and data fit each other."""
    set_arithmetic(loaded.config.train)
    timeout_minutes = loaded.config.train.timeout_minutes
    topology = distributed.start(timeout_minutes)
    lifetime.watch_peers(topology.world_size, timeout_minutes)
    topology = share_models(topology, loaded.config)
    for name, group in (("tp", topology.tp.group), ("dp", topology.tp.data_group)):
        if group is not None:
            recorder.name_group(group, name)
    output_dir = Path(loaded.config.output_dir)
    earlier_run = lifetime.hold(output_dir)
    configure_logging(output_dir, topology.rank)
    if earlier_run is not None:
        _logger.warning(earlier_run)
    check_processes(loaded, topology.dp_size)
    zero = resolve_deepspeed_config(loaded.config.deepspeed, loaded.config, topology.dp_size)
    check_requirements(loaded, zero)
    check_attention(loaded.config.train, loaded.architecture, topology.device)
    with doing("corpus"):
        corpus = open_corpus(loaded.config.data)
    with doing("verify the data"):
        whole = loaded.config.data.verify == "whole"
        verify_contents(corpus.files, topology.rank, distributed.gather_objects, whole=whole)
        corpus.check_vocabulary(loaded.architecture.vocab_size)
    return Prepared(loaded.config, loaded.architecture, topology, zero, corpus)


def _announce(loaded: LoadedRun, prepared: Prepared) -> None:
    """Say on the main process what a user should know before training, and write `run.yaml`."""
    if not prepared.topology.is_main:
        return
    _logger.info("running on %s", describe_machine())
    warn_of_missing_export(loaded.config)
    for warning in (*loaded.warnings, reduction_advice(prepared.zero), version_advice()):
        if warning is not None:
            _logger.warning(warning)
    (Path(loaded.config.output_dir) / "run.yaml").write_text(dump_run_config(loaded.config))


def _find_start(prepared: Prepared) -> SavedRun | None:
    """The checkpoint to resume from, which belongs to this run, or a clean output directory."""
    config, topology = prepared.config, prepared.topology
    saved = find_saved_run(config, topology.is_main)
    if saved is not None:
        fingerprints = prepared.corpus.fingerprints(like=saved.record.trainer.data_fingerprints)
        check_resume(saved, config, prepared.architecture, fingerprints)
        _logger.info("resuming from %s", saved.checkpoint)
        return saved
    output_dir = Path(config.output_dir)
    if topology.is_main:
        moved = set_aside_earlier_run(output_dir)
        configure_logging(output_dir, topology.rank)
        if moved is not None:
            _logger.info("moved the earlier run's results to %s", moved)
        _logger.info("no checkpoint to resume from: starting at step 0")
    distributed.barrier()
    if not topology.is_main:
        configure_logging(output_dir, topology.rank)
    return None


def _build_trainer(prepared: Prepared, saved: SavedRun | None, stop: StopSignal) -> Trainer:
    config, train, corpus = prepared.config, prepared.config.train, prepared.corpus
    topology = prepared.topology
    state = saved.record.trainer if saved else None
    output_dir = Path(config.output_dir)
    place = (train.micro_batch_size, topology.dp_rank, topology.dp_size)
    train_data = TrainingBatches(
        corpus.train, corpus.weights, train.seq_length, train.global_batch_size, *place, train.seed
    )
    valid_data = None
    if corpus.valid is not None:
        batches = config.eval.batches
        limit = None if batches is None else batches * train.global_batch_size
        valid_data = ValidationBatches(corpus.valid, train.seq_length, *place, limit)
    telemetry = Telemetry(
        config,
        output_dir,
        total_steps=train.steps,
        resume_step=state.step if state else 0,
        wandb_run_id=state.telemetry.get("wandb_run_id") if state else None,
        is_main=topology.is_main,
    )
    return Trainer(
        config=config,
        architecture=prepared.architecture,
        topology=topology,
        zero_stage=prepared.zero.stage,
        corpus=corpus,
        train_data=train_data,
        valid_data=valid_data,
        telemetry=telemetry,
        checkpoints=CheckpointStore(output_dir / layout.CHECKPOINTS, config.checkpoint, topology),
        stop=stop,
        final={},
    )


def _train(prepared: Prepared, trainer: Trainer, saved: SavedRun | None) -> None:
    """All phases that are left, each with an engine of its own."""
    config, architecture = prepared.config, prepared.architecture
    topology, stage = prepared.topology, prepared.zero.stage
    phases = phases_left(config, saved)
    completed = saved.record.trainer.step if saved else 0
    with doing("start"):
        _make_room(prepared, trainer, saved, phases)
    weights: DenseWeights = AwaitedState()
    if saved is None:
        with doing("start"):
            weights = _initial_weights(config, architecture)
    for number, phase in enumerate(phases):
        with recorder.phase("setup"):
            with doing("build"):
                engine = _build_engine(prepared, phase, weights)
                with torch.no_grad():
                    session = phase.method.start(engine.state, engine.model)
            if number == 0 and saved is not None:
                with doing("resume"):
                    restore_phase(saved, engine, session, topology, stage)
        meter = _build_meter(config.train, engine, topology.world_size)
        trainer.stop.take_over()
        trainer.run_phase(phase, engine, session, meter, completed)
        plan = storage_plan(config, stage, topology.dp_size, topology.device)
        expected = closed_form(config, architecture, phase.method, plan)
        trainer.final |= memory_metrics(engine.memory.measured, expected)
        completed = phase.last_step
        if number + 1 < len(phases):
            with recorder.phase("setup"), doing("transition"):
                weights = take_dense_weights(
                    engine, architecture, phase.method, config.train, topology.tp
                )
            text = f"transition: {phase.name} hands over to {phases[number + 1].name}"
            trainer.telemetry.event(completed, text, {"method/event": "transition"})


def _make_room(
    prepared: Prepared, trainer: Trainer, saved: SavedRun | None, phases: Sequence[Phase]
) -> None:
    """Make sure before training that its checkpoints can be saved. A collective call.

    Raises:
        CheckpointError: on every rank: they cannot be.
    """
    config, topology, stage = prepared.config, prepared.topology, prepared.zero.stage
    if saved is not None:
        moved = trainer.checkpoints.continue_from(saved.checkpoint, saved.record.trainer.step)
        if moved is not None:
            _logger.info("moved checkpoints that this run does not continue to %s", moved)
    plan = storage_plan(config, stage, topology.dp_size, topology.device)
    largest = max(
        saved_bytes(closed_form(config, prepared.architecture, phase.method, plan), plan)
        for phase in phases
    )
    trainer.checkpoints.check_room(largest)


def _initial_weights(
    config: RunConfig, architecture: ModelConfig
) -> Mapping[str, torch.Tensor] | None:
    """Dense weights to start from, each read on access; or None for the seed's random draw."""
    path = config.train.init_from
    if path is None:
        return None
    model = DenseModel(Path(path))
    if model.architecture.model_dump() != architecture.model_dump():
        raise CheckpointError(
            f"train.init_from: the model in {path} has another architecture than "
            f"{config.model}; use the same one"
        )
    return model.weights()


def _build_engine(prepared: Prepared, phase: Phase, weights: DenseWeights) -> TrainEngine:
    """A fresh engine for a phase, from dense weights or from the seed's random draw."""
    config, file = prepared.config, prepared.corpus.valid or prepared.corpus.train[0]
    count = min(_PROBE_TOKENS, config.train.seq_length)
    engine = build_engine(
        prepared.architecture,
        phase.method,
        config,
        prepared.zero,
        prepared.topology,
        weights,
        torch.from_numpy(file.window(0, count)).unsqueeze(0),
    )
    counts = parameter_counts(engine.model)
    _logger.info(
        "phase %s: %s trained and %s frozen parameters",
        phase.name,
        f"{counts.trainable:,}",
        f"{counts.frozen:,}",
    )
    return engine


def _build_meter(train: TrainConfig, engine: TrainEngine, processes: int) -> ThroughputMeter:
    device = engine.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return ThroughputMeter(
        train.global_batch_size * train.seq_length,
        flops_per_token(engine.model, train.seq_length),
        peak_flops(name, train.precision),
        num_devices=processes,
    )
