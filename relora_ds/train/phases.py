"""The phases of a run, one engine after the other, and the way back from a step that is not
believed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from relora_ds.accounting.flops import flops_per_token, parameter_counts
from relora_ds.accounting.recorder import recorder
from relora_ds.activity import at_step, doing
from relora_ds.checkpoint.export.dense import FiniteWeights, ResizedVocabulary
from relora_ds.checkpoint.format.record import GuardState
from relora_ds.checkpoint.resume import (
    find_earlier,
    phases_left,
    restore_phase,
)
from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.data.batches import DocumentBatches, ValidationBatches
from relora_ds.data.source import Corpus
from relora_ds.engine.assemble import AwaitedState, DenseWeights, build_engine
from relora_ds.engine.device import device_memory
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import (
    CheckpointError,
    DivergenceError,
)
from relora_ds.methods.registry import Phase
from relora_ds.model.llama import Llama
from relora_ds.parallel.topology import Topology, as_one_island
from relora_ds.parallel.zero import ZeroSettings
from relora_ds.planning.memory_report import (
    closed_form,
    memory_metrics,
    saved_bytes,
    storage_plan,
)
from relora_ds.train.checks import doubt_about_the_start, initial_model
from relora_ds.train.guards.agreement import Place
from relora_ds.train.guards.steps import Rewind
from relora_ds.train.loop import Trainer
from relora_ds.train.telemetry.memory import restart_peak
from relora_ds.train.telemetry.meter import ThroughputMeter
from relora_ds.train.telemetry.peak import peak_flops
from relora_ds.train.telemetry.sinks.base import last_figures
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
    """Of one island."""
    corpus: Corpus
    valid_data: ValidationBatches | DocumentBatches | None
    """This process's share of the validation set, if the run has one."""

    @property
    def share(self) -> RunConfig:
        """The run as one island sees it, which is what engine and closed forms are about."""
        return as_one_island(self.config)


def train(prepared: Prepared, trainer: Trainer, saved: SavedRun | None) -> None:
    """Train to the end, and again from an earlier checkpoint where a guard asks for it."""
    start = saved
    while (rewind := _train_phases(prepared, trainer, start)) is not None:
        at_step(None)  # as at a start, checkpoints are verified and read for as long as it takes
        with doing("rollback"):
            start = _go_back(prepared, trainer, rewind, saved)


def _go_back(
    prepared: Prepared, trainer: Trainer, rewind: Rewind, started_from: SavedRun | None
) -> SavedRun | None:
    """The checkpoint to go on from, with everything that lasts brought back to it.

    Args:
        started_from: what this process resumed; None if it began the run.

    Returns:
        None for the beginning of the run.

    Raises:
        DivergenceError: the process resumed a checkpoint that is too late, and none is earlier.
    """
    trainer.checkpoints.settle()  # of a step before; all ranks are here
    directory = trainer.checkpoints.directory
    saved = find_earlier(directory, rewind.steps[0], prepared.topology.is_main) or started_from
    if saved is not None and saved.record.trainer.step > rewind.steps[0]:
        raise DivergenceError(
            f"{rewind.reason}: there is no checkpoint of at most {rewind.steps[0]} steps to go "
            "back to; resume from an earlier one, or start again with lower learning rates"
        )
    guards = saved.record.trainer.guards if saved else GuardState()
    completed = saved.record.trainer.step if saved else 0
    trainer.guard = trainer.guard.rewound(rewind, guards)
    trainer.telemetry.rewind(completed)
    trainer.final = last_figures(Path(prepared.config.output_dir) / "metrics.jsonl")
    left_out = ", ".join(str(step + 1) for step in rewind.steps)
    _logger.warning(
        "%s: going back to %s; the batch of step %s is left out",
        rewind.reason,
        saved.checkpoint if saved else "the beginning",
        left_out,
    )
    return saved


def _train_phases(prepared: Prepared, trainer: Trainer, saved: SavedRun | None) -> Rewind | None:
    """All phases that are left, each with an engine of its own.

    Returns:
        What a phase ended with that did not come to its end.
    """
    config, architecture = prepared.config, prepared.architecture
    topology, stage = prepared.topology, prepared.zero.stage
    phases = phases_left(config, saved)
    completed = saved.record.trainer.step if saved else 0
    with doing("start"):
        _make_room(prepared, trainer, saved, phases)
    weights: DenseWeights = AwaitedState()
    if saved is None:
        with doing("start"):
            weights = _initial_weights(prepared)
    for number, phase in enumerate(phases):
        resumed = saved if number == 0 else None
        engine, rewind = _train_phase(prepared, trainer, phase, weights, resumed, completed)
        if rewind is not None:
            engine.destroy()
            return rewind
        device = topology.device
        share = prepared.share
        plan = storage_plan(share, stage, topology.dp_size, device, device_memory(device))
        expected = closed_form(share, architecture, phase.method, plan)
        trainer.final |= memory_metrics(engine.memory.measured, expected)
        completed = phase.last_step
        if number + 1 < len(phases):
            trainer.agreement.meet(Place("transition", completed, phase.name))
            with recorder.phase("setup"), doing("transition"):
                weights = take_dense_weights(
                    engine, architecture, phase.method, config.train, topology.tp
                )
            text = f"transition: {phase.name} hands over to {phases[number + 1].name}"
            trainer.telemetry.event(completed, text, {"method/event": "transition"})
    return None


def _train_phase(
    prepared: Prepared,
    trainer: Trainer,
    phase: Phase,
    weights: DenseWeights,
    resumed: SavedRun | None,
    completed: int,
) -> tuple[TrainEngine, Rewind | None]:
    """Build a phase's engine and train with it.

    Nothing else that holds the model outlives the call: the engine can be freed.

    Args:
        weights: what the model starts from.
        resumed: the checkpoint that the phase goes on from, if it does not begin.
        completed: updates of the run so far.

    Returns:
        The engine, and where the run has to go back to if the phase did not come to its end.
    """
    topology = prepared.topology
    with recorder.phase("setup"):
        with doing("build"):
            engine = _build_engine(prepared, phase, weights)
            with torch.no_grad():
                session = phase.method.start(engine.state, engine.model)
        if resumed is not None:
            with doing("resume"):
                restore_phase(resumed, engine, session, topology, prepared.zero.stage)
                _refuse_non_finite(engine, resumed)
    meter = _build_meter(prepared.config.train, engine, topology.world_size)
    # that of the steps shall not hide behind the start's
    trainer.build_peak = restart_peak(engine.device)
    trainer.stop.take_over()
    return engine, trainer.run_phase(phase, engine, session, meter, completed)


def _make_room(
    prepared: Prepared, trainer: Trainer, saved: SavedRun | None, phases: Sequence[Phase]
) -> None:
    """Make sure before training that its checkpoints can be saved. A collective call.

    Raises:
        CheckpointError: on every rank: they cannot be.
    """
    share, topology, stage = prepared.share, prepared.topology, prepared.zero.stage
    if saved is not None:
        moved = trainer.checkpoints.continue_from(saved.checkpoint, saved.record.trainer.step)
        if moved is not None:
            _logger.info("moved checkpoints that this run does not continue to %s", moved)
    device = topology.device
    plan = storage_plan(share, stage, topology.dp_size, device, device_memory(device))
    apart = 0 if share.islands.share_gradients else share.parallel.islands - 1
    largest = max(
        saved_bytes(closed_form(share, prepared.architecture, phase.method, plan), plan, apart)
        for phase in phases
    )
    trainer.checkpoints.check_room(largest)


def _refuse_non_finite(engine: TrainEngine, saved: SavedRun) -> None:
    """Raise if a checkpoint restored something that training cannot go on from.

    Raises:
        CheckpointError: on every process: it holds values that are not finite.
    """
    problem = engine.non_finite()
    if problem is not None:
        raise CheckpointError(
            f"{saved.checkpoint} cannot be continued, not finite: {problem}; the run diverged "
            "before it was saved: name an earlier checkpoint with checkpoint.resume=PATH"
        )


def _initial_weights(prepared: Prepared) -> Mapping[str, torch.Tensor] | None:
    """Dense weights to start from, each read on access; or None for the seed's random draw.

    Raises:
        CheckpointError: they are of another model. One that is not finite is found when it is read.
        DataError: they were trained with another tokenizer.
    """
    model = initial_model(prepared.config, prepared.architecture, prepared.corpus)
    if model is None:
        return None
    weights = FiniteWeights(model.weights(), model.path)
    doubt = doubt_about_the_start(model, prepared.architecture)
    if doubt is None:
        return weights
    if prepared.topology.is_main:
        _logger.warning(doubt)
    return ResizedVocabulary(weights, prepared.architecture.vocab_size)


def _build_engine(prepared: Prepared, phase: Phase, weights: DenseWeights) -> TrainEngine:
    """A fresh engine for a phase, from dense weights or from the seed's random draw."""
    config, file = prepared.config, prepared.corpus.valid or prepared.corpus.train[0]
    parts = config.parallel.sequence_parts
    count = max(1, min(_PROBE_TOKENS, config.train.seq_length) // parts) * parts
    engine = build_engine(
        prepared.architecture,
        phase.method,
        prepared.share,
        prepared.zero,
        prepared.topology,
        weights,
        torch.from_numpy(file.window(0, count)).unsqueeze(0),
    )
    assert isinstance(engine.model, Llama)
    engine.model.separate_documents(prepared.corpus.document_end)
    if config.train.compile:
        engine.model.compile_layers()
    start, stop = prepared.topology.tp.span(prepared.architecture.intermediate_size)
    width = engine.update_size.mlp_width(stop - start)
    if width != stop - start:
        _logger.info("MLPs of %d columns are computed at %d", stop - start, width)
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
