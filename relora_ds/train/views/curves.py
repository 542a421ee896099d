"""A metric of several runs in one picture, over steps, tokens, time or bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from relora_ds.errors import ConfigError
from relora_ds.train.telemetry.sinks.base import number_of, read_metrics
from relora_ds.train.views.figures import COLOURS, new_figure, plain, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Scale = Literal["step", "tokens", "time", "bytes"]
SCALES: dict[Scale, str] = {
    "step": "optimizer step",
    "tokens": "tokens",
    "time": "training time (hours)",
    "bytes": "bytes on the wire per process",
}
"""What metrics are drawn over, with the words for it."""


@dataclass(frozen=True)
class Curves:
    """What a run reported, line by line."""

    name: str
    records: Sequence[dict[str, Any]]

    def scale(self, scale: Scale) -> np.ndarray:
        """Where each line stands on an axis, fp64 (lines,).

        Time is that of training, without evaluations and checkpoints: tokens between two lines
        over the rate that the later one reports. Bytes are those of every step at the rate of the
        line that closes its stretch.
        """
        steps = np.array([record["step"] for record in self.records], dtype=np.float64)
        if scale == "step":
            return steps
        tokens = self._of("tokens")
        if scale == "tokens":
            return tokens
        passed = np.diff(np.concatenate([[0.0], np.maximum.accumulate(np.nan_to_num(tokens))]))
        if scale == "time":
            rates = self._of("throughput/tokens_per_second")
            return np.cumsum(np.nan_to_num(passed / rates)) / 3600.0
        taken = np.diff(np.concatenate([[0.0], steps]))
        return np.cumsum(np.nan_to_num(taken * self._of("communication/wire_bytes_per_step")))

    def series(self, metric: str, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
        """Where a metric was reported, and its values; lines without it are left out."""
        place, values = self.scale(scale), self._of(metric)
        known = np.isfinite(values) & np.isfinite(place)
        return place[known], values[known]

    def _of(self, key: str) -> np.ndarray:
        return np.array([number_of(record, key) for record in self.records], dtype=np.float64)


def read_curves(run: Path) -> Curves:
    """What a run reported so far.

    Args:
        run: its output_dir.

    Raises:
        ConfigError: there is no `metrics.jsonl`, or it is empty.
    """
    path = run / "metrics.jsonl"
    try:
        records = [record for record in read_metrics(path) if "tokens" in record]
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; give the output_dir of a run"
        ) from error
    if not records:
        raise ConfigError(f"{path} holds no report of a step; there is nothing to plot")
    return Curves(run.resolve().name, records)


def plot_runs(runs: Iterable[Path], output: Path, metric: str, scale: Scale) -> Path:
    """Draw a metric of some runs.

    Args:
        runs: their output directories.
        output: the picture; its suffix decides the format.
        metric: a key of `metrics.jsonl`, such as `train/loss`.
        scale: what it is drawn over.

    Returns:
        `output`.

    Raises:
        ConfigError: a run cannot be read, none has the metric, or the picture cannot be written.
    """
    every = [read_curves(run) for run in runs]
    figure = new_figure()
    if not draw_curves(figure.subplots(), every, metric, scale):
        known = sorted({key for each in every for record in each.records for key in record})
        raise ConfigError(f"no run reports {metric}; they report {', '.join(known)}")
    save_figure(figure, output)
    return output


def draw_curves(axes: Axes, runs: Sequence[Curves], metric: str, scale: Scale) -> bool:
    """Draw a metric of some runs into axes; whether any of them reports it."""
    drawn = False
    for number, run in enumerate(runs):
        place, values = run.series(metric, scale)
        if len(values) == 0:
            continue
        few = "o-" if len(values) < 30 else "-"
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(place, values, few, ms=3, lw=1.4, color=colour, label=plain(run.name))
        drawn = True
    axes.set_xlabel(SCALES[scale])
    axes.set_ylabel(plain(metric))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if drawn and len(runs) > 1:
        axes.legend(fontsize=9)
    return drawn
