"""How a court proceeds, for the person who watches."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from benchmarks.trials.description import Court
from benchmarks.trials.ledger import Ledger, Trial
from benchmarks.trials.rule import to_do, tried_rates
from benchmarks.trials.running import run_directory
from benchmarks.trials.verdict import reported
from relora_ds.train.telemetry.sinks.base import last_figures


class CourtProgress:
    """A bar for the court and one for every run; lines where there is no terminal."""

    def __init__(self, court: Court, ledger: Ledger) -> None:
        self._court, self._ledger = court, ledger
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            auto_refresh=False,  # by another thread, while processes are started from this one
            disable=not console.is_terminal,
        )
        self._console = console
        self._all = self._bars.add_task("runs", note="")
        self._each: dict[Trial, TaskID] = {}

    def __enter__(self) -> CourtProgress:
        self._bars.start()
        self.tick()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def started(self, trial: Trial) -> None:
        steps = self._court.loaded(trial.contestant).config.train.steps
        self._each[trial] = self._bars.add_task(str(trial), total=steps, note="")
        if self._bars.disable:
            self._console.print(f"{trial}: running", highlight=False, soft_wrap=True)

    def ended(self, trial: Trial, outcome: str) -> None:
        self._bars.remove_task(self._each.pop(trial))
        self._console.print(f"{trial}: {outcome}", highlight=False, soft_wrap=True)

    def tick(self) -> None:
        if self._bars.disable:
            return
        done, total = _extent(self._court, self._ledger)
        self._bars.update(self._all, completed=done, total=total)
        for trial, task in self._each.items():
            figures = last_figures(run_directory(self._court, trial) / "metrics.jsonl")
            loss = figures.get("train/loss")
            note = "" if loss is None else f"loss {loss:.3f}"
            self._bars.update(task, completed=figures.get("step", 0), note=note)
        self._bars.refresh()


def _extent(court: Court, ledger: Ledger) -> tuple[int, int]:
    """Finished runs, and all of those that are known to be needed."""
    done = total = 0
    for contestant in court.contestants:
        tried = {} if contestant.tuned_as else tried_rates(court.config, contestant, ledger)
        finished = sum(value is not None for value in tried.values())
        finished += len(reported(court, contestant, ledger))
        done += finished
        waiting = to_do(court.config, contestant, ledger)
        is_tuned = all(value is not None for value in tried.values())
        total += len(tried) + len(court.config.seeds) if not is_tuned else finished + len(waiting)
    return done, total
