"""One run from its description to its results, top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from relora_ds.accounting.flops import flops_per_token, parameter_counts
from relora_ds.accounting.recorder import recorder
from relora_ds.checkpoint.export import DenseModel
from relora_ds.checkpoint.resume import check_resume, choose_checkpoint, set_aside_earlier_run
from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.checkpoint.saved_state import SavedState, is_written_state
from relora_ds.checkpoint.store import (
    CheckpointStore,
    TrainerState,
    verify_on_main,
)
from relora_ds.checkpoint.tp_state import PartOfState
from relora_ds.config.load import LoadedRun, check_processes, dump_run_config
from relora_ds.data.batches import TrainingBatches, ValidationBatches
from relora_ds.data.source import Corpus, open_corpus
from relora_ds.engine import distributed
from relora_ds.engine.assemble import DenseWeights, build_engine
from relora_ds.engine.deepspeed.config import reduction_advice, resolve_deepspeed_config
from relora_ds.engine.deepspeed.version import version_advice
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import CheckpointError, DivergenceError, PreemptedError
from relora_ds.methods.registry import Phase, check_requirements, plan_phases
from relora_ds.parallel.topology import Topology, share_models
from relora_ds.parallel.zero import ZeroSettings
from relora_ds.planning.memory_report import closed_form, memory_metrics, storage_plan
from relora_ds.train.launcher_watch import LauncherWatch
from relora_ds.train.loop import Trainer
from relora_ds.train.results import warn_of_missing_export, write_results
from relora_ds.train.stop import StopSignal
from relora_ds.train.telemetry.logs import configure_logging
from relora_ds.train.telemetry.meter import ThroughputMeter
from relora_ds.train.telemetry.peak import peak_flops
from relora_ds.train.telemetry.telemetry import Telemetry
from relora_ds.train.transition import take_dense_weights

_logger = logging.getLogger(__name__)
_PROBE_TOKENS = 128


def run(loaded: LoadedRun) -> None:
    """Train, evaluate, checkpoint and export what the run file describes.

    Raises:
        ReloraError: see the classes in `errors`; each has its exit code.
    """
    started_at = datetime.now(UTC)
    launcher = LauncherWatch()
    topology = distributed.start(loaded.config.train.timeout_minutes)
    topology = share_models(topology, loaded.config)
    for name, group in (("tp", topology.tp.group), ("dp", topology.tp.data_group)):
        if group is not None:
            recorder.name_group(group, name)
    output_dir = Path(loaded.config.output_dir)
    configure_logging(output_dir, topology.rank)
    check_processes(loaded, topology.dp_size)
    zero = resolve_deepspeed_config(loaded.config.deepspeed, loaded.config, topology.dp_size)
    check_requirements(loaded, zero.stage)
    corpus = open_corpus(loaded.config.data)
    corpus.check_vocabulary(loaded.architecture.vocab_size)
    checkpoint, state = _find_start(loaded, topology, corpus)
    stop = StopSignal(launcher)
    trainer = _build_trainer(loaded, topology, zero.stage, corpus, state, stop)
    if topology.is_main:
        warn_of_missing_export(loaded.config)
        for warning in (*loaded.warnings, reduction_advice(zero), version_advice()):
            if warning is not None:
                _logger.warning(warning)
        (output_dir / "run.yaml").write_text(dump_run_config(loaded.config))
    status, reason = "failed", None
    try:
        with recorder:
            _train(trainer, zero, checkpoint, state)
        status = "completed"
    except PreemptedError as error:
        status, reason = "preempted", str(error)
        raise
    except DivergenceError as error:
        status, reason = "diverged", str(error)
        raise
    finally:
        trainer.telemetry.close(status)
        if topology.is_main:
            write_results(trainer, status, reason, started_at)
        if status in ("completed", "preempted"):
            # a launcher ends the other ranks when one has left: nobody leaves before all are done
            distributed.barrier()


def _find_start(
    loaded: LoadedRun, topology: Topology, corpus: Corpus
) -> tuple[Path | None, TrainerState | None]:
    """The verified checkpoint to resume from, or a clean output directory."""
    config = loaded.config
    problem, checkpoint = None, None
    if topology.is_main:  # one look at the disk: ranks must not disagree
        try:
            checkpoint = choose_checkpoint(config)
        except CheckpointError as error:
            problem = str(error)
    problem, checkpoint = distributed.broadcast_object((problem, checkpoint))
    if problem is not None:
        raise CheckpointError(problem)
    if checkpoint is None:
        if topology.is_main:
            moved = set_aside_earlier_run(Path(config.output_dir))
            configure_logging(Path(config.output_dir), topology.rank)
            if moved is not None:
                _logger.info("moved the earlier run's results to %s", moved)
            _logger.info("no checkpoint to resume from: starting at step 0")
        distributed.barrier()
        if not topology.is_main:
            configure_logging(Path(config.output_dir), topology.rank)
        return None, None
    verify_on_main(checkpoint, topology.is_main)
    state = check_resume(
        checkpoint,
        config,
        loaded.architecture.model_dump(mode="json"),
        list(corpus.fingerprints()),
    )
    _logger.info("resuming from %s", checkpoint)
    return checkpoint, state


def _build_trainer(
    loaded: LoadedRun,
    topology: Topology,
    stage: int,
    corpus: Corpus,
    state: TrainerState | None,
    stop: StopSignal,
) -> Trainer:
    config, train = loaded.config, loaded.config.train
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
        architecture=loaded.architecture,
        topology=topology,
        zero_stage=stage,
        corpus=corpus,
        train_data=train_data,
        valid_data=valid_data,
        telemetry=telemetry,
        checkpoints=CheckpointStore(output_dir / "checkpoints", config.checkpoint.keep, topology),
        stop=stop,
        final={},
    )


def _train(
    trainer: Trainer,
    zero: ZeroSettings,
    checkpoint: Path | None,
    state: TrainerState | None,
) -> None:
    """All phases that are left, each with an engine of its own."""
    phases = plan_phases(trainer.config)
    if state is not None:
        names = [phase.name for phase in phases]
        phases = phases[names.index(state.phase) :]
    completed, device = state.step if state else 0, trainer.topology.device
    weights: DenseWeights = _initial_weights(trainer) if state is None else None
    for number, phase in enumerate(phases):
        with recorder.phase("setup"):
            engine = _build_engine(trainer, phase, zero, weights)
            with torch.no_grad():
                session = phase.method.start(engine.state, engine.model)
            if number == 0 and checkpoint is not None and state is not None:
                saved = SavedRun(checkpoint, trainer.config, trainer.architecture)
                other = _state_of_other_topology(trainer, saved)
                trainer.checkpoints.load(engine, checkpoint, other)
                session.load_state_dict(saved.own_method_state(trainer.topology.tp))
                distributed.barrier()  # one process of a node may restore what all of them read
        meter = _build_meter(trainer, engine)
        trainer.run_phase(phase, engine, session, meter, completed)
        plan = storage_plan(trainer.config, trainer.zero_stage, trainer.topology.dp_size, device)
        expected = closed_form(trainer.config, trainer.architecture, phase.method, plan)
        trainer.final |= memory_metrics(engine.memory.measured, expected)
        completed = phase.last_step
        if number + 1 < len(phases):
            with recorder.phase("setup"):
                weights = take_dense_weights(
                    engine,
                    trainer.architecture,
                    phase.method,
                    trainer.config.train,
                    trainer.topology.tp,
                )
            text = f"transition: {phase.name} hands over to {phases[number + 1].name}"
            trainer.telemetry.event(completed, text, {"method/event": "transition"})


def _state_of_other_topology(trainer: Trainer, saved: SavedRun) -> SavedState | None:
    """This rank's part of the saved state by name; None if it can read the files as they are."""
    topology, state, tp = trainer.topology, saved.trainer, trainer.topology.tp
    before = state.dp_size, state.tensor_size, state.zero_stage
    now = topology.dp_size, tp.size, trainer.zero_stage
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


def _initial_weights(trainer: Trainer) -> Mapping[str, torch.Tensor] | None:
    """Dense weights to start from, each read on access; or None for the seed's random draw."""
    path = trainer.config.train.init_from
    if path is None:
        return None
    model = DenseModel(Path(path))
    if model.architecture.model_dump() != trainer.architecture.model_dump():
        raise CheckpointError(
            f"train.init_from: the model in {path} has another architecture than "
            f"{trainer.config.model}; use the same one"
        )
    return model.weights()


def _build_engine(
    trainer: Trainer, phase: Phase, zero: ZeroSettings, weights: DenseWeights
) -> TrainEngine:
    """A fresh engine for a phase, from dense weights or from the seed's random draw."""
    file = trainer.corpus.valid or trainer.corpus.train[0]
    count = min(_PROBE_TOKENS, trainer.config.train.seq_length)
    engine = build_engine(
        trainer.architecture,
        phase.method,
        trainer.config,
        zero,
        trainer.topology,
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


def _build_meter(trainer: Trainer, engine: TrainEngine) -> ThroughputMeter:
    train = trainer.config.train
    device = engine.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return ThroughputMeter(
        trainer.tokens_per_step,
        flops_per_token(engine.model, train.seq_length),
        peak_flops(name, train.precision),
        num_devices=trainer.topology.world_size,
    )
