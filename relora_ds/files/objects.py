"""JSON objects in files that may be missing, half-written, edited, or anything else by now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from relora_ds.files.regular import read_regular

_LARGEST = 64 << 20  # bytes; what a run says of itself is some kilobytes


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a regular file; None where there is none that can be read."""
    try:
        return parse_object(read_regular(path, _LARGEST))
    except OSError:
        return None


def parse_object(text: str | bytes) -> dict[str, Any] | None:
    """The JSON object that a text is; None where it is anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
