"""Progress for the person who watches: a live bar on a terminal, plain lines elsewhere.

Both are sinks that show the reports about training. Everything else that is worth a line, such as
an event, an evaluation or a checkpoint, goes through logging, which stands above a live bar.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable

import rich.console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from relora_ds.train.telemetry.sinks.base import Metrics, Sink, Status

_logger = logging.getLogger(__name__)


def build_console(
    total_steps: int,
    resume_step: int = 0,
    *,
    is_tty: bool | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Sink:
    """The progress display that suits stderr.

    Args:
        total_steps: optimizer steps of the whole run.
        resume_step: steps done before this process started.
        is_tty: whether stderr is a terminal. Default: asks it.
        clock: seconds from a monotonic clock.
    """
    eta = RemainingTime(total_steps, resume_step, clock)
    if sys.stderr.isatty() if is_tty is None else is_tty:
        return BarConsole(total_steps, resume_step, eta)
    return PlainConsole(total_steps, eta)


class RemainingTime:
    """Estimates the time to the end from the pace of the latest reports.

    Args:
        total_steps: optimizer steps of the whole run.
        resume_step: steps done before this process started.
        clock: seconds from a monotonic clock, so that the estimate is never negative.
    """

    _WINDOW = 20  # reports: long enough to smooth, short enough to follow a change of pace

    def __init__(self, total_steps: int, resume_step: int, clock: Callable[[], float]) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._marks = deque([(resume_step, clock())], maxlen=self._WINDOW)

    def update(self, step: int) -> float | None:
        """Seconds that remain after `step`, None while the pace is not known."""
        self._marks.append((step, self._clock()))
        first_step, first_time = self._marks[0]
        steps, seconds = step - first_step, self._marks[-1][1] - first_time
        if steps <= 0 or seconds <= 0:
            return None
        return max(0, self._total_steps - step) * seconds / steps


class PlainConsole:
    """One line per report, through logging: for files, schedulers and pipes."""

    def __init__(self, total_steps: int, eta: RemainingTime) -> None:
        self._total_steps = total_steps
        self._eta = eta

    def log(self, step: int, metrics: Metrics) -> None:
        """Write one line, unless the report is not about training."""
        if "train/loss" in metrics:
            figures = [*_figures(metrics), *_eta_text(self._eta.update(step))]
            _logger.info(
                "step %s/%s | %s", f"{step:,}", f"{self._total_steps:,}", " | ".join(figures)
            )

    def close(self, status: Status = "completed") -> None:
        """Nothing is pending."""


class BarConsole:
    """A live bar at the bottom of the terminal; log lines scroll above it.

    While it lives, `sys.stderr` is a proxy that prints above the bar, and `sys.stdout` too where it
    is a terminal. Reports with an evaluation also leave a line, as the bar forgets them.
    """

    def __init__(
        self,
        total_steps: int,
        resume_step: int,
        eta: RemainingTime,
        console: rich.console.Console | None = None,
    ) -> None:
        self._eta = eta
        self._progress = Progress(
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.0f}%"),
            TextColumn("{task.fields[figures]}"),
            console=console or rich.console.Console(stderr=True),
            refresh_per_second=2,
            redirect_stdout=sys.stdout.isatty(),
            expand=True,
        )
        self._task: TaskID = self._progress.add_task(
            "train", total=total_steps, completed=resume_step, figures="starting"
        )
        self._progress.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Move the bar, unless the report is not about training."""
        if "train/loss" in metrics:
            figures = [*_figures(metrics), *_eta_text(self._eta.update(step))]
            self._progress.update(self._task, completed=step, figures="  ".join(figures))
        if "eval/loss" in metrics:
            _logger.info("step %s | %s", f"{step:,}", " | ".join(_figures(metrics)))

    def close(self, status: Status = "completed") -> None:
        """Leave the bar as it stands and give the terminal back."""
        self._progress.stop()


def format_duration(seconds: float) -> str:
    """A duration of at least zero in its two largest units: ``42s``, ``3m05s``, ``1d02h``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02d}h"
    if hours:
        return f"{hours}h{minute:02d}m"
    return f"{minutes}m{second:02d}s" if minutes else f"{second}s"


def format_count(value: float) -> str:
    """A count with three significant digits and a metric prefix: ``950``, ``12.3k``, ``1.20M``."""
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit * 0.9995:  # rounds to a four-digit number without this prefix
            scaled = value / limit
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{prefix}"
    return f"{value:.0f}"


_FORMATS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("train/loss", lambda value: f"loss {value:.4f}"),
    ("eval/loss", lambda value: f"eval loss {value:.4f}"),
    ("eval/perplexity", lambda value: f"perplexity {value:,.2f}"),
    ("train/lr", lambda value: f"lr {value:.2e}"),
    ("throughput/tokens_per_second", lambda value: f"{format_count(value)} tokens/s"),
    ("throughput/mfu", lambda value: f"mfu {value:.1%}"),
)


def _figures(metrics: Metrics) -> list[str]:
    """The figures that a person follows, as far as they are known."""
    values = ((metrics.get(name), form) for name, form in _FORMATS)
    return [form(value) for value, form in values if isinstance(value, int | float)]


def _eta_text(remaining_s: float | None) -> list[str]:
    return [] if remaining_s is None else [f"eta {format_duration(remaining_s)}"]
