"""Saving checkpoints: complete or absent, never half, and never half of the ranks.

A checkpoint is written to `step_N.tmp` by all ranks, each its own files; when all of them say that
their files are on disk, the first rank writes the manifest, renames the directory to `step_N` and
names it in `latest`. Whatever goes wrong on whichever rank, all ranks hear of it at the same step.

The writing is done by a thread of each rank. In the foreground the main threads only ask each other
until all are done. In the background training goes on from a copy of the state, and the main
threads ask once per step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from threading import Event

import torch

from relora_ds.activity import doing
from relora_ds.checkpoint.find import list_checkpoints
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.record import RunRecord
from relora_ds.checkpoint.format.stamp import Origin
from relora_ds.checkpoint.saving.agreement import Agreement
from relora_ds.checkpoint.saving.contents import Contents, contents_of_rank, size_of
from relora_ds.checkpoint.saving.flight import Flight, Ready, SaveResult
from relora_ds.checkpoint.saving.problem import Problem, explain, size
from relora_ds.checkpoint.saving.publish import begin, give_up, publish
from relora_ds.checkpoint.saving.retention import abandon_later, prune
from relora_ds.checkpoint.saving.room import check_room, free_bytes
from relora_ds.checkpoint.saving.snapshot import HostBuffers, Snapshot
from relora_ds.checkpoint.saving.task import Files, Worker, write_contents
from relora_ds.config.schema import RunConfig
from relora_ds.config.sections import CheckpointConfig
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import CheckpointError
from relora_ds.files.durable import describe, remedy
from relora_ds.parallel.topology import Topology

_logger = logging.getLogger(__name__)
_PATIENCE_S = 0.05  # between two questions to the other ranks


class CheckpointStore:
    """The `checkpoints` directory of a run. A collective to construct, as are all methods.

    Args:
        directory: created when it is needed.
        settings: how many are kept, and what happens to a save that fails.
        topology: which process this is.
        spared: step of the checkpoint that stays whatever its age; None: there is no such one.
    """

    def __init__(
        self,
        directory: Path,
        settings: CheckpointConfig,
        topology: Topology,
        spared: int | None = None,
    ) -> None:
        self.directory = directory
        self._spared = spared
        self._settings = settings
        self._topology = topology
        self._agreement = Agreement(topology.world_size)
        self._buffers = HostBuffers(topology.device)
        self._worker = Worker(topology.rank, topology.device)
        self._flight: Flight | None = None
        self._digest: tuple[RunConfig, str] | None = None

    def continue_from(self, source: Path, step: int) -> Path | None:
        """Move aside what is not of the line that goes on from a checkpoint.

        Args:
            source: the checkpoint.
            step: of it.

        Returns:
            Where it is now, on the first rank; None if there was nothing.

        Raises:
            CheckpointError: on every rank: it cannot be moved.
        """
        moved, problem = None, None
        if self._topology.is_main:
            try:
                moved = abandon_later(self.directory, source, step)
            except OSError as error:
                problem = f"{describe(error)}; {remedy(error)}"
        problem = self._agreement.gather(problem)[0]
        if problem is not None:
            raise CheckpointError(f"checkpoints of an abandoned line cannot be moved: {problem}")
        return moved

    def check_room(self, needed: int) -> None:
        """Make sure before training that checkpoints can be saved.

        Args:
            needed: bytes of one of them.

        Raises:
            CheckpointError: on every rank: they cannot be.
        """
        free = check_room(self.directory, needed, self._agreement, self._topology)
        keep = self._settings.keep
        if keep is None or free is None or not self._topology.is_main:
            return
        kept = keep + (self._spared is not None)
        more = kept + 1 - len(list_checkpoints(self.directory))  # one is written before one goes
        if free < more * needed:
            _logger.warning(
                "%s: %s are free, but %d more checkpoints of about %s will be kept or written: "
                "free %s, or lower checkpoint.keep",
                self.directory,
                size(free),
                more,
                size(needed),
                size(more * needed - free),
            )

    def save(
        self,
        engine: TrainEngine,
        record: RunRecord,
        method_tensors: Mapping[str, torch.Tensor],
        tokenizer: Path | None,
        *,
        last: bool = False,
    ) -> list[SaveResult]:
        """Save a state, or begin to: an asynchronous save goes on while the caller does.

        Args:
            engine: holds weights and optimizer state after `record.trainer.step` updates.
            record: what the checkpoint says of itself.
            method_tensors: of the method's state, as this tensor-parallel rank holds them; may be
                live.
            tokenizer: copied into the checkpoint.
            last: the run ends here: the save is complete on return, and its failure an error.

        Returns:
            Saves that ended meanwhile, this one or the one before.

        Raises:
            CheckpointError: on every rank: a save failed that must not.
        """
        ended = self.finish()
        started = time.monotonic()
        background = self._settings.asynchronous and not last
        with doing("save: begin"):
            origin = Origin(record.trainer.step, self._run_digest(record))
            live = contents_of_rank(
                engine, record, method_tensors, tokenizer, self._topology, origin
            )
            self._flight = self._start(record.trainer.step, live, background, last, started)
        self._flight.stall_seconds = time.monotonic() - started
        return ended if background else [*ended, *self.finish()]

    def hold(self) -> None:
        """Wait until the state may change: until a save in the background has its copy of it."""
        flight = self._flight
        if flight is None or flight.snapshot is None:
            return
        waited = time.monotonic()
        with doing("save: copy"):
            flight.snapshot.hold()
        flight.snapshot = None
        flight.stall_seconds += time.monotonic() - waited

    def poll(self) -> list[SaveResult]:
        """The save in the background, if it has ended; called by all ranks after the same step.

        Raises:
            CheckpointError: on every rank: it failed, and must not.
        """
        result = None if self._flight is None else self._advance()
        return [] if result is None else [self._checked(*result)]

    def finish(self) -> list[SaveResult]:
        """Wait for the save in the background, if there is one, and say how it ended.

        Raises:
            CheckpointError: on every rank: it failed, and must not.
        """
        waited = time.monotonic()
        while self._flight is not None:
            with doing(f"save: {self._flight.stage}"):
                self._flight.task.wait(_PATIENCE_S)
                result = self._advance(waited)
            if result is not None:
                return [self._checked(*result)]
        return []

    def settle(self) -> None:
        """Wait for the save in the background while an error of all ranks ends the run.

        A failure of the save is logged: the error is what the run ends with.
        """
        try:
            self.finish()
        except CheckpointError as error:
            _logger.error("%s", error)

    def _run_digest(self, record: RunRecord) -> str:
        """What the first rank's description of the run comes to; asked once per run.

        Its word is taken by all: it writes the description that files are compared with.
        """
        if self._digest is None or self._digest[0] is not record.config:
            own = record.origin.run if self._topology.is_main else ""
            self._digest = record.config, self._agreement.gather(own)[0]
        return self._digest[1]

    def _start(
        self, step: int, live: Contents, background: bool, last: bool, started: float
    ) -> Flight:
        """Begin a save; every failure from here on is the flight's."""
        directory, staging, is_main = self.directory, self._staging(step), self._topology.is_main
        snapshot, failure = None, None
        if background:
            self._buffers.recycle()
            try:
                snapshot = Snapshot(live, self._topology.device, self._buffers)
            except MemoryError as error:
                failure = error

        def copy() -> Ready:
            if failure is not None:
                raise failure
            contents = live if snapshot is None else snapshot.copy()
            if is_main:
                begin(staging)
            return Ready(contents, size_of(contents), free_bytes(directory))

        task = self._worker.start(copy)
        return Flight(step, task, Event(), last, started, snapshot)

    def _advance(self, waited: float | None = None) -> tuple[Flight, SaveResult] | None:
        """Ask all ranks how far they are, and take the next step once all are done.

        Args:
            waited: when this rank began to stand still, if it does.
        """
        flight = self._flight
        assert flight is not None
        done, failed = self._agreement.look(flight.task.done, flight.task.failed)
        if failed:
            flight.cancelled.set()
        if not done:
            return None
        if failed and flight.stage != "give up":
            said = self._agreement.gather(flight.task.problem())
            self._give_up(flight, [problem for problem in said if problem is not None])
        elif flight.stage == "copy":
            self._write(flight, flight.task.result())
        elif flight.stage == "write":
            parts: list[Files] = self._agreement.gather(flight.task.result())
            self._publish(flight, {name: file for part in parts for name, file in part.items()})
        else:
            if waited is not None:
                flight.stall_seconds += time.monotonic() - waited
            self._flight = None
            return flight, self._result(flight)
        return None

    def _write(self, flight: Flight, ready: Ready) -> None:
        """Have every rank write its files, if there is space for all of them."""
        flight.stage = "write"
        staging, cancelled = self._staging(flight.step), flight.cancelled
        flight.needed, flight.free = self._agreement.room(ready.bytes, ready.free)
        if flight.free is not None and flight.free < flight.needed:
            problem = Problem(0, f"{staging}: not enough space", "", no_space=True)
            self._give_up(flight, [problem])
            return
        contents = ready.contents
        flight.task = self._worker.start(lambda: write_contents(contents, staging, cancelled))

    def _publish(self, flight: Flight, files: Files) -> None:
        flight.stage = "publish"
        flight.files = {name: written.bytes for name, written in files.items()}
        staging, final = self._staging(flight.step), self._final(flight.step)
        keep = self._settings.keep

        def work() -> None:
            publish(staging, final, files)
            if keep is not None:
                prune(final, keep, self._spared)

        flight.task = self._worker.start(work if self._topology.is_main else _do_nothing)

    def _give_up(self, flight: Flight, problems: list[Problem]) -> None:
        flight.stage, flight.problems = "give up", problems
        staging = self._staging(flight.step)

        work = partial(give_up, staging) if self._topology.is_main else _do_nothing
        flight.task = self._worker.start(work)

    def _result(self, flight: Flight) -> SaveResult:
        problem = None
        if flight.problems:
            complete = list_checkpoints(self.directory) if self._topology.is_main else []
            newest = self._agreement.gather(complete[-1] if complete else None)[0]
            problem = explain(flight.step, flight.problems, flight.needed, flight.free, newest)
        return SaveResult(
            step=flight.step,
            path=None if problem else self._final(flight.step),
            problem=problem,
            bytes=sum(flight.files.values()),
            seconds=time.monotonic() - flight.started,
            stall_seconds=flight.stall_seconds,
        )

    def _checked(self, flight: Flight, result: SaveResult) -> SaveResult:
        """The result, unless it has to end the run."""
        fatal = flight.must_succeed or self._settings.on_save_error == "fail"
        if result.problem is not None and fatal:
            raise CheckpointError(result.problem)
        return result

    def _final(self, step: int) -> Path:
        return self.directory / layout.checkpoint(step)

    def _staging(self, step: int) -> Path:
        return layout.staging(self._final(step))


def _do_nothing() -> None:
    """What other ranks do while the first one acts for all."""
