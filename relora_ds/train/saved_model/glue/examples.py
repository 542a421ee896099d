"""Examples of a task: from the files of gluebenchmark.com, a saved data set, or the hub."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from relora_ds.data.formats import Faults, OnError
from relora_ds.data.ingest.hub import is_saved
from relora_ds.errors import DataError
from relora_ds.extras import require
from relora_ds.files.regular import open_regular
from relora_ds.train.saved_model.glue.tasks import SCORES, Task

HUB = "nyu-mll/glue"
"""The data set on the Hugging Face hub."""
_FILES = {
    "train": "train.tsv",
    "validation": "dev.tsv",
    "validation_matched": "dev_matched.tsv",
    "validation_mismatched": "dev_mismatched.tsv",
}


class Example(NamedTuple):
    """One example."""

    texts: tuple[str, ...]
    """A sentence or two."""
    label: float
    """Number of the class, or the similarity."""


@dataclass(frozen=True)
class Examples:
    """Those of a task."""

    train: list[Example]
    validation: dict[str, list[Example]]
    """By what is put behind the name of a metric."""
    skipped: dict[str, int]
    """Rows that were left out, by reason."""


def read_examples(
    task: Task, data: str, on_error: OnError = "fail", limit: int | None = None
) -> Examples:
    """All labelled examples of a task.

    Args:
        task: whose columns are read.
        data: folder with the task's tab-separated files or with the folders of several tasks;
            folder that `save_to_disk` wrote; or a data set of the Hugging Face hub.
        on_error: "fail" stops at the first row that cannot be used; "skip" counts it and goes on.
        limit: examples of each split at most; None for all.

    Raises:
        DataError: a file, split or column is missing, or a row cannot be used.
        ConfigError: the package datasets is missing, and `data` needs it.
    """
    faults = Faults(on_error)
    split = _tables(task, data, faults) if _is_folder(data) else _saved(task, data, faults)

    def read(name: str) -> list[Example]:
        found = [example for example, _ in zip(split(name), _counted(limit), strict=False)]
        if not found:
            raise DataError(f"{data}: split {name} of {task.name} holds no example")
        return found

    train = read("train")
    validation = {suffix: read(name) for suffix, name in task.validation.items()}
    return Examples(train, validation, dict(faults.counts))


def _counted(limit: int | None) -> Iterator[int]:
    number = 0
    while limit is None or number < limit:
        yield number
        number += 1


def _is_folder(data: str) -> bool:
    return Path(data).exists() and not is_saved(data)


def _tables(task: Task, data: str, faults: Faults) -> Callable[[str], Iterator[Example]]:
    """What reads a split of a folder of tab-separated files."""
    places = [Path(data), Path(data, task.table.folder)]
    folder = next((place for place in places if (place / _FILES["train"]).is_file()), None)
    if folder is None:
        tried = " nor ".join(str(place / _FILES["train"]) for place in places)
        raise DataError(
            f"{data}: there is neither {tried}: name the folder of the task as gluebenchmark.com's "
            f"archive has it, one that save_to_disk wrote, or the data set {HUB}"
        )
    return lambda split: _table(task, folder / _FILES[split], faults)


def _table(task: Task, path: Path, faults: Faults) -> Iterator[Example]:
    """Examples of a file, but for blank lines. GLUE's have no quotes: a quotation mark is part of a
    sentence."""
    table = task.table
    try:
        with open_regular(path) as lines:
            first = 1
            if isinstance(table.label, str):
                head = next(lines, b"").removeprefix(codecs.BOM_UTF8)
                names, first = head.decode(errors="replace").rstrip("\r\n").split("\t"), 2
                columns = [_column(names, name, path) for name in (*table.texts, table.label)]
            else:
                columns = [int(place) for place in (*table.texts, table.label)]
            for number, line in enumerate(lines, first):
                if line in (b"\n", b"\r\n"):
                    continue
                where, cells = f"{path}:{number}", list[str]()
                try:
                    cells = _cells(line)
                    *texts, label = (cells[column] for column in columns)
                except UnicodeDecodeError:
                    faults.report("not UTF-8", where, "save the file as UTF-8")
                except IndexError:
                    faults.report(
                        "missing column",
                        where,
                        f"{len(cells)} columns, but column {max(columns) + 1} is read",
                    )
                else:
                    yield from _example(task, tuple(texts), label, where, faults)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _cells(line: bytes) -> list[str]:
    return line.decode().rstrip("\r\n").split("\t")


def _column(names: Sequence[str], name: str | int, path: Path) -> int:
    if name not in names:
        raise DataError(
            f"{path}:1: no column {name!r} among {', '.join(map(repr, names))}: this is no file of "
            "that task, or has lost its first line"
        )
    if names.count(str(name)) > 1:
        raise DataError(
            f"{path}:1: has {names.count(str(name))} columns {name!r}: remove all but one"
        )
    return names.index(str(name))


def _saved(task: Task, data: str, faults: Faults) -> Callable[[str], Iterator[Example]]:
    """What reads a split of a data set of Hugging Face's."""
    package = require("datasets", "datasets", f"--data {data}, which is no folder of files,")
    package.disable_progress_bars()
    try:
        if is_saved(data):
            splits = package.load_from_disk(data)
        else:
            splits = package.load_dataset(data, task.name)
    except Exception as error:  # nothing that the package raises has a base of its own
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{data}: cannot be opened as a data set ({type(error).__name__}: {reason}): name a "
            f"folder of tab-separated files, one that save_to_disk wrote, or {HUB} of the hub"
        ) from error
    return lambda split: _rows(task, data, splits, split, faults)


def _rows(task: Task, data: str, splits: Any, split: str, faults: Faults) -> Iterator[Example]:
    if not isinstance(splits, dict) or split not in splits:
        has = ", ".join(splits) if isinstance(splits, dict) else "one split without a name"
        raise DataError(f"{data}: {task.name} needs the split {split!r}, and it has {has}")
    rows, columns = splits[split], (*task.texts, "label")
    if missing := [name for name in columns if name not in rows.column_names]:
        raise DataError(
            f"{data}: {split} has no column {missing[0]!r} among {sorted(rows.column_names)}: "
            f"{task.name} reads {', '.join(columns)}"
        )
    for number, row in enumerate(rows.select_columns(list(columns)), 1):
        *texts, label = (row[name] for name in columns)
        where = f"{data}:{split}:row {number}"
        if not all(isinstance(text, str) for text in texts):
            faults.report("missing text", where, f"a sentence is {texts}, but must be text")
        else:
            yield from _example(task, tuple(texts), label, where, faults)


def _example(
    task: Task, texts: tuple[str, ...], label: object, where: str, faults: Faults
) -> Iterator[Example]:
    """The example, unless its label is none of the task's."""
    number = _number(task, label)
    if number is not None:
        yield Example(texts, number)
        return
    low, high = SCORES
    rule = (
        f"a similarity from {low:g} to {high:g}"
        if task.is_regression
        else f"one of {', '.join(task.labels)}, or its number from 0 to {len(task.labels) - 1}"
    )
    faults.report(
        "wrong label",
        where,
        f"{label!r}, but a label of {task.name} is {rule}; a test split, which has no labels, is "
        "of no use here",
    )


def _number(task: Task, label: object) -> float | None:
    """What is predicted; None of a label that the task does not have."""
    if isinstance(label, str) and label in task.labels:
        return float(task.labels.index(label))
    try:
        number = float(label) if isinstance(label, str | int | float) else float("nan")
    except ValueError:
        return None
    low, high = SCORES if task.is_regression else (0, len(task.labels) - 1)
    whole = task.is_regression or number.is_integer()
    return number if low <= number <= high and whole else None
