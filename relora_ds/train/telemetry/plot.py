"""A run's loss curve as a picture, from its metrics.jsonl."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relora_ds.errors import ConfigError
from relora_ds.train.telemetry.sinks.base import number_of, read_metrics
from relora_ds.train.views.figures import new_figure, plain, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOSSES = "train/loss", "eval/loss"
_LOSS_COLOUR = "#1f5fa8"
_EVAL_COLOUR = "#c8391f"
_LR_COLOUR = "#4a4a4a"
_EVENT_COLOURS = ("#5b8c3a", "#8a5fb0", "#b8860b", "#3a8c8c")
_MAX_EVENT_LINES = 40  # more would hide the curve; they become ticks at its foot
_MIN_SMOOTHED = 20  # fewer points are better looked at one by one
_GAP = 4.0  # a line breaks where reports are missing for this many usual intervals


def plot_run(metrics_path: Path, output_path: Path) -> Path:
    """Draw training loss, evaluation loss, learning rate and events over the optimizer steps.

    Args:
        metrics_path: metrics.jsonl of a run; the run may still be going.
        output_path: the picture; its suffix decides the format.

    Returns:
        `output_path`.

    Raises:
        ConfigError: there is no such file, it holds no loss, or the picture cannot be written.
    """
    try:
        records = read_metrics(metrics_path)
    except OSError as error:
        raise ConfigError(
            f"cannot read {metrics_path}: {error.strerror}; give the output_dir of a run"
        ) from error
    if not has_losses(records):
        raise ConfigError(f"{metrics_path} holds no finite loss; there is nothing to plot")
    save_figure(loss_figure(records, metrics_path.resolve().parent.name), output_path)
    return output_path


def loss_figure(records: Sequence[dict[str, Any]], name: str) -> Figure:
    """Losses, learning rate and events of a run.

    Args:
        records: of its metrics.jsonl, with a loss among them.
        name: of the run.
    """
    figure = new_figure()
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _draw_loss(loss_axes, records)
    _draw_learning_rate(lr_axes, records)
    _draw_events(loss_axes, records)
    loss_axes.legend(loc="upper right", frameon=True, framealpha=0.9, fontsize=9)
    loss_axes.set_title(_title(plain(name), records), fontsize=11, loc="left")
    return figure


def has_losses(records: Sequence[dict[str, Any]]) -> bool:
    """Whether there is anything to plot."""
    return any(math.isfinite(number_of(record, key)) for record in records for key in _LOSSES)


def _draw_loss(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    steps, loss = _series(records, "train/loss")
    eval_steps, eval_loss = _series(records, "eval/loss")
    trend = loss
    if len(loss) >= _MIN_SMOOTHED:
        trend = _smooth(loss)
        axes.plot(*_with_gaps(steps, loss), color=_LOSS_COLOUR, alpha=0.25, linewidth=0.8)
        axes.plot(*_with_gaps(steps, trend), color=_LOSS_COLOUR, linewidth=1.8, label="train loss")
    elif len(loss):
        axes.plot(*_with_gaps(steps, loss), "o-", color=_LOSS_COLOUR, ms=3, label="train loss")
    if len(eval_loss):
        axes.plot(
            eval_steps, eval_loss, "o", color=_EVAL_COLOUR, ms=5, mec="white", label="eval loss"
        )
    limits = _loss_limits(steps, trend, eval_loss)
    if limits is not None:
        axes.set_ylim(limits)
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_learning_rate(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, lr = _series(records, "train/lr")
    axes.plot(
        *_with_gaps(steps, lr), color=_LR_COLOUR, linewidth=1.2, marker="." if len(lr) == 1 else ""
    )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate", fontsize=9)
    axes.set_xlabel("optimizer step")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    first, last = records[0]["step"], records[-1]["step"]
    margin = max(0.5, (last - first) / 50)
    axes.set_xlim(first - margin, last + margin)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_events(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    """A thin vertical line per event, or a tick at the foot where there are many of a kind."""
    steps_of: dict[str, list[int]] = defaultdict(list)
    for record in records:
        if event := record.get("method/event"):
            steps_of[str(event)].append(record["step"])
    for number, (event, steps) in enumerate(steps_of.items()):
        axes.vlines(
            steps,
            0.0,
            1.0 if len(steps) <= _MAX_EVENT_LINES else 0.03,
            transform=axes.get_xaxis_transform(),
            color=_EVENT_COLOURS[number % len(_EVENT_COLOURS)],
            linewidth=0.8,
            alpha=0.7,
            zorder=0,
            label=plain(event) + (f" ({len(steps):,})" if len(steps) > 1 else ""),
        )


def _series(records: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that report `key`; null becomes NaN. Two (n,) arrays."""
    reported = [(record["step"], number_of(record, key)) for record in records if key in record]
    pairs = np.array(reported, dtype=np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a fortieth of the curve. NaN is left out and stays NaN.

    Unlike an exponential average it does not lag, so that what follows an event is seen where it
    happened. The window is cut off at both ends.
    """
    half = max(1, len(values) // 80)
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    number = np.maximum(count[high] - count[low], 1)
    return np.where(known, (total[high] - total[low]) / number, np.nan)


def _with_gaps(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The series with a NaN wherever reports are missing, so that no line bridges the gap."""
    if len(steps) < 3:
        return steps, values
    spacing = np.diff(steps)
    gaps = np.flatnonzero(spacing > _GAP * np.median(spacing)) + 1
    return np.insert(steps, gaps, steps[gaps - 1]), np.insert(values, gaps, np.nan)


def _loss_limits(
    steps: np.ndarray, trend: np.ndarray, eval_loss: np.ndarray
) -> tuple[float, float] | None:
    """Limits that show the course of the run, not its first steps; None for matplotlib's own.

    The loss of an untrained model is several times what follows and would flatten it. Beyond the
    first twentieth nothing is cut off: a trend that rises later is in the picture.
    """
    settled = trend
    if len(trend) >= _MIN_SMOOTHED:
        settled = trend[steps >= steps[0] + (steps[-1] - steps[0]) / 20]
    shown = np.concatenate([settled, eval_loss])
    shown = shown[np.isfinite(shown)]
    if len(shown) == 0:
        return None
    low, high = float(shown.min()), float(shown.max())
    margin = 0.08 * (high - low) or 0.1
    return low - margin, high + margin


def _title(name: str, records: Sequence[dict[str, Any]]) -> str:
    """The run's name and, where there is one, its last evaluation."""
    for record in reversed(records):
        loss, perplexity = (number_of(record, f"eval/{key}") for key in ("loss", "perplexity"))
        if math.isfinite(loss):
            text = f"{name}: eval loss {loss:.3f}"
            if math.isfinite(perplexity):
                text += f", perplexity {perplexity:,.2f}"
            return f"{text} at step {record['step']:,}"
    return name
