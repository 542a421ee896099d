"""The training loop. It names no method and knows no stage."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from relora_ds.accounting.recorder import recorder
from relora_ds.activity import at_step, doing, moved, unlimited
from relora_ds.checkpoint.format.record import RunRecord, ShardedLike, TrainerState
from relora_ds.checkpoint.format.tensors import split_tensors
from relora_ds.checkpoint.method_state import unwrap
from relora_ds.checkpoint.saving.flight import SaveResult
from relora_ds.checkpoint.saving.store import CheckpointStore
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.data.batches import DocumentBatches, TrainingBatches, ValidationBatches
from relora_ds.data.source import Corpus
from relora_ds.engine.accelerator import describe_arithmetic
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import DivergenceError, PreemptedError
from relora_ds.methods.interface import Event, Session
from relora_ds.methods.registry import Phase
from relora_ds.model.llama import Llama
from relora_ds.model.mlp import is_padded
from relora_ds.parallel.topology import Topology
from relora_ds.train.evaluate import evaluation_metrics
from relora_ds.train.guards.agreement import Agreement, Place, digest_of
from relora_ds.train.guards.losses import Seen, Targets
from relora_ds.train.guards.steps import Rewind, StepGuard
from relora_ds.train.guards.weights import newest_good, refuse_drift
from relora_ds.train.lifetime.stop import StopSignal
from relora_ds.train.telemetry.events import describe_event, event_metrics
from relora_ds.train.telemetry.memory import max_allocated_bytes
from relora_ds.train.telemetry.meter import ThroughputMeter
from relora_ds.train.telemetry.telemetry import Telemetry
from relora_ds.train.telemetry.trace import StepTrace

_logger = logging.getLogger(__name__)


@dataclass
class Trainer:
    """What lasts for a whole run, over its phases."""

    config: RunConfig
    architecture: ModelConfig
    topology: Topology
    zero_stage: int
    corpus: Corpus
    train_data: TrainingBatches
    valid_data: ValidationBatches | DocumentBatches | None
    telemetry: Telemetry
    checkpoints: CheckpointStore
    stop: StopSignal
    agreement: Agreement
    guard: StepGuard
    trace: StepTrace
    final: dict[str, Any]
    """Last value of each metric, for the summary."""
    save_figures: dict[str, Any] = field(default_factory=dict)
    """Of the last save that ended, until they are reported: they join a line of their own time, so
    that a run that is killed behind a save misses no line."""
    failed_saves: int = 0
    """Since this process started."""
    build_peak: int = 0
    """Most memory in use until the phase's first step, in bytes."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one update trains on, over all ranks."""
        return self.config.train.global_batch_size * self.config.train.seq_length

    def run_phase(
        self,
        phase: Phase,
        engine: TrainEngine,
        session: Session[Any],
        meter: ThroughputMeter,
        completed: int,
    ) -> Rewind | None:
        """Train from `completed` updates to the end of the phase.

        Args:
            phase: which method is in charge, and for how long.
            engine: of the phase.
            session: the phase's method at work on the engine.
            meter: counts the time of steps.
            completed: updates of the run so far.

        Returns:
            Where the run has to go back to, if the phase did not come to its end.

        Raises:
            DivergenceError: loss, gradient or weights are not to be believed; none was saved.
            DesyncError: the processes no longer hold the same run.
            PreemptedError: a signal asked to stop; a checkpoint was saved.
        """
        # a forward pass changes nothing that is saved: until its end a state may still be copied
        holding = engine.model.register_forward_hook(lambda *_: self.checkpoints.hold())
        try:
            return self._run_steps(phase, engine, session, meter, completed)
        finally:
            holding.remove()
            self.trace.finish()
            self.checkpoints.hold()  # whoever comes next takes the model apart

    def _run_steps(
        self,
        phase: Phase,
        engine: TrainEngine,
        session: Session[Any],
        meter: ThroughputMeter,
        completed: int,
    ) -> Rewind | None:
        """The steps of `run_phase`."""
        seen = Seen()
        self._meet("start", completed, phase)
        for step in range(completed, phase.last_step):
            at_step(step + 1)
            with self.trace.step(step + 1):
                metrics = self._update(phase, engine, session, step, seen)
            if self.guard.found is not None:
                return self.guard.rewind(step, engine.non_finite())
            done = step + 1
            meter.step()
            here = Place("end of step", done, phase.name)
            stopping = self.agreement.ask(here, self.stop.requested())
            self._ask_for_saves(done)
            last = done == self.config.train.steps
            due = _is_due(done, self.config.checkpoint.every) or self._goes_on_from(phase, done)
            saves = stopping or last or due
            if metrics or saves or last or _is_due(done, self.config.log.every):
                metrics |= self._method_metrics(session, metrics)
                metrics |= self._step_metrics(seen, self._learning_rates(phase, step), meter)
                metrics |= self._engine_metrics(engine)
                seen = Seen()
            if "method/event" in metrics or _is_due(done, self.config.train.digest_every):
                engine.check_replicas(session.replicas(), metrics.get("method/event"))
            with meter.paused():
                if last or _is_due(done, self.config.eval.every):
                    metrics |= self._evaluate(engine)
                if metrics:
                    self._report(done, metrics)
                doubt = self._doubt(phase, engine, session, done, metrics, saves)
                if doubt is not None:
                    return self.guard.rescue(done, doubt)
                if saves:
                    with doing("save"), unlimited():
                        self.save(phase, engine, session, done, last or stopping)
            if stopping and not last:
                raise PreemptedError(f"asked to stop: saved a checkpoint after step {done}")
        at_step(None)
        return None

    def _meet(self, point: str, done: int, phase: Phase) -> None:
        """Make sure that all ranks are at the same place."""
        self.agreement.meet(Place(point, done, phase.name))

    def _update(
        self, phase: Phase, engine: TrainEngine, session: Session[Any], step: int, seen: Seen
    ) -> dict[str, Any]:
        """The update after `step` completed ones, between the method's two hooks.

        Returns:
            Metrics of events; loss and gradient norm go to `seen`.
        """
        recorder.begin_step()
        own_step = step - phase.first_step
        engine.set_learning_rates(self._learning_rates(phase, step))

        def agree(kind: str, state: bytes) -> None:
            self.agreement.meet(Place(kind, step, phase.name, digest_of(state)))

        engine.state.before_event = agree
        left_out = self.guard.leaves_out(step)
        engine.state.gradients.batch = lambda: (
            () if left_out else _noting(self.train_data.micro_batches(step))
        )
        if type(session).before_step is not Session.before_step:
            self.checkpoints.hold()
        with recorder.phase("event"), torch.no_grad():
            before = session.before_step(own_step)
        engine.begin_update(step)
        if not left_out:
            admit, targets = self.guard.admit(step), Targets(self.corpus.document_end)
            batches = _noting(self.train_data.micro_batches(step), targets)
            loss, norm = engine.train_step(batches, admit)
            if self.guard.found is not None:
                return {}
            if not self.guard.skipped:
                seen.note(step, loss, norm, targets.share)
        self.checkpoints.hold()  # a step that was left out has had no forward pass
        products, common = session.products_to_merge(own_step + 1), self._shared(phase, step + 1)
        engine.end_round(step + 1, products, common)
        with recorder.phase("event"), torch.no_grad():
            after = session.after_step(own_step + 1)
        metrics = self._event_metrics(step + 1, before, after)
        return metrics | ({"guards/event": "skip"} if self.guard.skipped else {})

    def _method_metrics(self, session: Session[Any], events: Mapping[str, Any]) -> dict[str, Any]:
        """What the method reports for a line of the log, beside the events of the last update."""
        with recorder.phase("eval"), torch.no_grad():
            report = session.report()
        event = report.event or events.get("method/event")
        return report.metrics | ({"method/event": event} if event else {})

    def _doubt(
        self,
        phase: Phase,
        engine: TrainEngine,
        session: Session[Any],
        done: int,
        metrics: Mapping[str, Any],
        saves: bool,
    ) -> str | None:
        """Why the weights after `done` updates are not to be believed, saved or reported.

        Raises:
            DivergenceError: an event changed what the model computes.
            DesyncError: the processes no longer hold the same run.
        """
        refuse_drift(metrics, self.config)
        loss = metrics.get("eval/loss")
        if loss is not None and not math.isfinite(loss):
            return f"step {done}: the validation loss is {loss}; {self._remedy()}"
        if not saves:
            return None
        with recorder.phase("checkpoint"), doing("save: checks"):
            self._meet("save", done, phase)
            engine.check_replicas(session.replicas(), metrics.get("method/event"))
            problem = engine.non_finite()
        if problem is None:
            return None
        return f"step {done}: not finite after the update: {problem}; {self._remedy()}"

    def _goes_on_from(self, phase: Phase, done: int) -> bool:
        """Whether a longer run may go on from here: the end of a stable phase is saved."""
        ends = done == phase.last_stable_step and _is_due(done, self.config.islands.every)
        return self.config.checkpoint.every > 0 and ends

    def _shared(self, phase: Phase, done: int) -> bool:
        """Whether weights are evaluated, saved or handed over after `done` updates, so that islands
        must have the same."""
        due = [_is_due(done, n) for n in (self.config.eval.every, self.config.checkpoint.every)]
        due.append(_is_due(done - phase.first_step, phase.method.config.refreshes_every or 0))
        return done == phase.last_step or self._goes_on_from(phase, done) or any(due)

    def _remedy(self) -> str:
        return "nothing of it was saved; lower the learning rates or lengthen the warm-up, and " + (
            newest_good(self.checkpoints.directory)
        )

    def _learning_rates(self, phase: Phase, step: int) -> dict[str, float]:
        factor = self.config.islands.rate_factor(step)
        rates = phase.learning_rates(step, self.config.optimizer)
        return {role: factor * rate for role, rate in rates.items()}

    def _engine_metrics(self, engine: TrainEngine) -> dict[str, Any]:
        """Most memory in use during the phase's steps and before them, in bytes, and how long
        islands have waited for each other in the phase."""
        waited = {} if engine.rounds is None else {"islands/wait_seconds": engine.rounds.waited}
        return waited | {
            "memory/max_allocated_bytes": max_allocated_bytes(engine.device),
            "memory/build_allocated_bytes": self.build_peak,
        }

    def _step_metrics(
        self, seen: Seen, rates: dict[str, float], meter: ThroughputMeter
    ) -> dict[str, Any]:
        """Figures of the last step; its loss alone, so that a resumed run reports the same number.

        Waits for the device.

        Raises:
            DivergenceError: on every rank: a loss or gradient norm since the last report is not
                finite on any.
        """
        metrics: dict[str, Any] = {}
        if seen.steps:
            loss, norm, broken = seen.over_ranks()
            if broken is not None:
                step, what = broken
                self.guard.note(step, "stop", what)
                raise DivergenceError(f"step {step + 1}: {what}: {self._remedy()}")
            metrics = {"train/loss": loss, "train/grad_norm": norm}
        moved = recorder.step_bytes()
        return metrics | {
            "train/lr": rates["dense"],
            **{f"train/{role}_lr": rate for role, rate in rates.items() if role != "dense"},
            "communication/bytes_per_step": moved.payload,
            "communication/wire_bytes_per_step": round(moved.wire),
            **self.guard.metrics(),
            **meter.read(),
        }

    def _event_metrics(self, done: int, *events: Event | None) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        for event in events:
            if event is None:
                continue
            metrics |= event_metrics(event)
            self.telemetry.event(done, describe_event(event))
        return metrics

    def _evaluate(self, engine: TrainEngine) -> dict[str, Any]:
        if self.valid_data is None:
            return {}
        assert isinstance(engine.model, Llama)
        kept = engine.weights_kept(len(self.valid_data))
        with recorder.phase("eval"), doing("evaluate"), kept:
            return evaluation_metrics(engine.model, self.valid_data, engine.device)

    def _report(self, done: int, metrics: dict[str, Any]) -> None:
        tokens = {"tokens": done * self.tokens_per_step, **self.train_data.figures(done)}
        line = {**tokens, **metrics, **self.save_figures}
        self.save_figures = {}
        self.final |= {"step": done, **line}
        self.telemetry.log(done, line)

    def save(
        self, phase: Phase, engine: TrainEngine, session: Session[Any], done: int, last: bool
    ) -> None:
        """Save everything after `done` updates, or begin to.

        Args:
            last: whether the run ends here, so that the save must be complete.

        Raises:
            CheckpointError: a checkpoint could not be saved, and the run is not to go on without.
        """
        with torch.no_grad():
            values, shards = unwrap(session.state_dict())
        plain, tensors = split_tensors(values)
        state = TrainerState(
            step=done,
            tokens=done * self.tokens_per_step,
            phase=phase.name,
            dp_size=self.topology.dp_size,
            tp_size=self.topology.tp.size,
            zero_stage=self.zero_stage,
            method=plain,
            method_shards={
                key: ShardedLike(parameter=name, dim=dim) for key, (name, dim) in shards.items()
            },
            telemetry=dict(self.telemetry.state_dict()),
            guards=self.guard.state(),
            data_fingerprints=list(self.corpus.fingerprints()),
            arithmetic=self._arithmetic(),
        )
        with recorder.phase("checkpoint"):
            record = RunRecord(state, self.config, self.architecture)
            ended = self.checkpoints.save(engine, record, tensors, self.corpus.tokenizer, last=last)
        self._note_saves(done, ended)
        if last:
            self.final |= self.save_figures

    def _arithmetic(self) -> str:
        """What computes this process's steps, as a resume is told."""
        train, device = self.config.train, self.topology.device
        padded = is_padded(self.architecture, train, device.type, self.topology.tp.size)
        return describe_arithmetic(device, bool(train.compile), padded)

    def _ask_for_saves(self, done: int) -> None:
        """Report the save in the background if it has ended."""
        with recorder.phase("checkpoint"):
            self._note_saves(done, self.checkpoints.poll())

    def _note_saves(self, done: int, ended: list[SaveResult]) -> None:
        """Report saves that ended, successfully or not."""
        for result in ended:
            self.save_figures = result.figures()
            if result.problem is None:
                self.telemetry.event(done, f"checkpoint {result}")
                continue
            self.failed_saves += 1
            self.save_figures = {"checkpoint/failed": self.failed_saves}
            if self.topology.is_main:
                _logger.warning("%s; training goes on", result.problem)


def _noting(
    micro_batches: Iterable[torch.Tensor], targets: Targets | None = None
) -> Iterator[torch.Tensor]:
    """The micro-batches, counted, each of which shows that the step goes on."""
    for tokens in micro_batches:
        moved()
        if targets is not None:
            targets.count(tokens)
        yield tokens


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
