"""Reading what earlier versions wrote: one function per format number, each a step to the next.

The number stands in `trainer.json` as `format`; before it was written there, it was 0. It rises
when a key is renamed, removed or changes its meaning, in any of the three descriptions. A key that
is added with a default does not raise it: what was written earlier gets the default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relora_ds.config.reading.document import show
from relora_ds.errors import CheckpointError

KEY = "format"
"""Where `trainer.json` keeps the number."""


@dataclass(frozen=True)
class Contents:
    """The descriptions in a checkpoint as plain data, of one format and not yet validated."""

    trainer: dict[str, Any]
    """`trainer.json` without its format number."""
    run: dict[str, Any]
    """`run.yaml`."""
    model: dict[str, Any]
    """`model.json`."""


def _from_0(old: Contents) -> Contents:
    """Name the tensor-parallel size as the code does, and the fingerprints for what they are."""
    trainer = {"tensor_size": 1} | old.trainer  # runs before tensor parallelism have none
    trainer = _renamed(trainer, {"tensor_size": "tp_size", "data": "data_fingerprints"})
    return replace(old, trainer=trainer)


def _from_1(old: Contents) -> Contents:
    """Nothing to do: files of tensors say since then which file of which step they are."""
    return old


_UPGRADES: tuple[Callable[[Contents], Contents], ...] = (_from_0, _from_1)
"""Entry N makes format N + 1 of format N. It raises nothing: what is missing or of another type is
found when the result is validated."""

FORMAT = len(_UPGRADES)
"""The number that is written today."""

STAMPED = 2
"""The first format whose files of tensors have a stamp."""


def upgrade(read: Contents, path: Path) -> Contents:
    """Today's form of what was read.

    Args:
        read: `trainer` with its format number, if it has one.
        path: of `trainer.json`, for messages.

    Raises:
        CheckpointError: the number is no format, or one of a later version.
    """
    number = format_of(read)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise CheckpointError(
            f"{path}: {KEY} is {show(number)}, but must be a number from 0 to {FORMAT}: the file "
            "is damaged; use another checkpoint"
        )
    if number > FORMAT:
        raise CheckpointError(
            f"{path}: {KEY} is {number}, but this version reads 0 to {FORMAT}: the checkpoint was "
            "written by a newer version; upgrade relora_ds"
        )
    trainer = {key: value for key, value in read.trainer.items() if key != KEY}
    contents = replace(read, trainer=trainer)
    for step in _UPGRADES[number:]:
        contents = step(contents)
    return contents


def format_of(read: Contents) -> Any:
    """The format number that a description has, whatever stands there."""
    return read.trainer.get(KEY, 0)


def _renamed(data: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Data with some of its keys, as far as they are there, under other names."""
    return {names.get(key, key): value for key, value in data.items()}
