"""Figures as files and as text of a page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from relora_ds.errors import ConfigError
from relora_ds.train.telemetry.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#1f5fa8", "#c8391f", "#5b8c3a", "#8a5fb0", "#b8860b", "#3a8c8c", "#4a4a4a", "#d06ca8")
"""Of curves that are compared, in turn."""


def new_figure(width: float = 9.0, height: float = 5.4) -> Figure:
    """An empty figure, inches."""
    from matplotlib.figure import Figure  # draws without a display, keeps no global state

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def plain(text: str) -> str:
    """A name for a picture as it is written: matplotlib sets what stands between dollars as a
    formula, and leaves out of legends what begins with an underscore."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def save_figure(figure: Figure, output: Path) -> None:
    """Write a figure; the suffix decides the format.

    Raises:
        ConfigError: the format is unknown, or the file cannot be written.
    """
    image = io.BytesIO()
    try:
        figure.savefig(image, format=output.suffix.lstrip(".") or "png")
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, image.getvalue())
    except ValueError as error:  # matplotlib lists the formats that it knows
        raise ConfigError(f"cannot write {output}: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}") from error


def as_svg(figure: Figure) -> str:
    """A figure as an SVG element for a page, without prolog and without metadata."""
    image = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(image, format="svg", metadata=nothing)
    text = image.getvalue()
    return text[text.index("<svg") :]
