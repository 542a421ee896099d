"""Traces of a few steps, for a look at where their time goes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from relora_ds.activity import doing

_logger = logging.getLogger(__name__)

TRACES = "traces"
"""Folder of the run's directory."""


class StepTrace:
    """Writes what the host and the device do in some steps, as Chrome and Perfetto read it.

    Every process writes a file of its own, `steps_<first>-<last>.rank<rank>.json.gz`. Steps that a
    run does not reach, or that a change of phase cuts off, are missing from it. A file that cannot
    be written is a warning: a trace is no reason to end a run.

    Args:
        steps: the first and the last step that is traced, numbered from 1; None for no trace.
        directory: where the files are written; made when it is needed.
        rank: of the process.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path, rank: int) -> None:
        self._steps = steps
        self._directory, self._rank = directory, rank
        self._profiler: profile | None = None
        self._traced: list[int] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace what happens inside if the step is one of those that are wanted."""
        if self._steps is None or not self._steps[0] <= number <= self._steps[1]:
            yield
            return
        if self._profiler is None:
            self._profiler = _start()
        self._traced.append(number)
        with record_function(f"step {number}"):
            yield
        if number == self._steps[1]:
            self.finish()

    def finish(self) -> None:
        """Write the steps that have been traced, if there are any."""
        profiler, traced = self._profiler, self._traced
        if profiler is None:
            return
        self._profiler, self._traced = None, []
        name = f"steps_{traced[0]}-{traced[-1]}.rank{self._rank}.json.gz"
        path = self._directory / name
        draft = path.with_name(f".{os.getpid()}.{name}")
        with doing("trace"):
            profiler.stop()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                profiler.export_chrome_trace(str(draft))
                draft.replace(path)
            except (OSError, RuntimeError) as error:
                _logger.warning("no trace of steps %d to %d: %s", traced[0], traced[-1], error)
                with suppress(OSError):
                    draft.unlink()
                return
        _logger.info("trace of steps %d to %d: %s", traced[0], traced[-1], path)


def _start() -> profile:
    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    profiler = profile(activities=kinds)
    profiler.start()
    return profiler
