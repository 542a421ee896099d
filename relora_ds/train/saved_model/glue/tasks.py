"""The nine tasks of GLUE: columns, labels and metrics, as on gluebenchmark.com."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

_VALIDATION: Mapping[str, str] = MappingProxyType({"": "validation"})
_ENTAILMENT = ("entailment", "not_entailment")
SCORES = (0.0, 5.0)
"""Smallest and largest similarity of two sentences in STS-B."""


@dataclass(frozen=True)
class Table:
    """Where the tab-separated files of a task have what is read of them."""

    folder: str
    """That the archives of gluebenchmark.com hold the files in."""
    texts: tuple[str | int, ...]
    """Names of the columns with the sentences; numbers from 0 where the files name no columns."""
    label: str | int


@dataclass(frozen=True)
class Task:
    """What is classified, and by what it is scored."""

    name: str
    texts: tuple[str, ...]
    """Columns of the data set in the format of Hugging Face's: one sentence or two."""
    labels: tuple[str, ...]
    """Name of each class by its number; none where the label is a similarity."""
    metrics: tuple[str, ...]
    """Of `metrics.METRICS`."""
    table: Table
    validation: Mapping[str, str] = field(default_factory=lambda: _VALIDATION)
    """Split by what is put behind the name of a metric on it."""

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number, not a class."""
        return not self.labels


_TASKS = (
    Task(
        "cola",
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews",),
        Table("CoLA", (3,), 1),
    ),
    Task(
        "sst2",
        ("sentence",),
        ("negative", "positive"),
        ("accuracy",),
        Table("SST-2", ("sentence",), "label"),
    ),
    Task(
        "mrpc",
        ("sentence1", "sentence2"),
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        Table("MRPC", ("#1 String", "#2 String"), "Quality"),
    ),
    Task(
        "stsb",
        ("sentence1", "sentence2"),
        (),
        ("pearson", "spearman"),
        Table("STS-B", ("sentence1", "sentence2"), "score"),
    ),
    Task(
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        Table("QQP", ("question1", "question2"), "is_duplicate"),
    ),
    Task(
        "mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        Table("MNLI", ("sentence1", "sentence2"), "gold_label"),
        {"": "validation_matched", "_mismatched": "validation_mismatched"},
    ),
    Task(
        "qnli",
        ("question", "sentence"),
        _ENTAILMENT,
        ("accuracy",),
        Table("QNLI", ("question", "sentence"), "label"),
    ),
    Task(
        "rte",
        ("sentence1", "sentence2"),
        _ENTAILMENT,
        ("accuracy",),
        Table("RTE", ("sentence1", "sentence2"), "label"),
    ),
    Task(
        "wnli",
        ("sentence1", "sentence2"),
        ("not_entailment", "entailment"),
        ("accuracy",),
        Table("WNLI", ("sentence1", "sentence2"), "label"),
    ),
)
TASKS = {task.name: task for task in _TASKS}
"""Every task by the name that `datasets` has for it."""
