"""Curves and spectra of a court's contestants, at their best rates."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.trials.ledger import Record
from relora_ds.train.telemetry.atomic import write_atomically

_STYLES = ("-", "--", ":", "-.")
_COLOURS = 10


def draw(records: Mapping[str, Sequence[Record]], directory: Path) -> list[Path]:
    """Write `curves.png` and `spectra.png`; what nothing is known of is left out.

    Args:
        records: reported runs by title; a line is their mean.
        directory: where the pictures go.

    Returns:
        What was written.
    """
    curves, spectra = {}, {}
    for title, each in records.items():
        if known := [record.curve for record in each if record.curve]:
            shared = set.intersection(*({step for step, _ in curve} for curve in known))
            steps = sorted(shared)
            values = np.array([[dict(curve)[step] for step in steps] for curve in known])
            curves[title] = (np.array(steps), values.mean(0))
        if known := [record.spectrum for record in each if record.spectrum]:
            spectra[title] = (np.linspace(0, 1, len(known[0])), np.array(known).mean(0))
    pictures = [
        ("curves", curves, "update", "validation perplexity"),
        ("spectra", spectra, "singular value, as a share of all", "over the largest"),
    ]
    return [
        _draw(lines, labels, directory / f"{name}.png")
        for name, lines, *labels in pictures
        if lines
    ]


def _draw(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]], labels: Sequence[str], path: Path
) -> Path:
    from matplotlib.figure import Figure  # draws with Agg: needs no display

    figure = Figure(figsize=(9.0, 5.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, (title, (across, values)) in enumerate(lines.items()):
        style = _STYLES[number // _COLOURS % len(_STYLES)]
        axes.plot(across, values, style, color=f"C{number % _COLOURS}", label=title, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.legend(fontsize=7)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())
    return path
