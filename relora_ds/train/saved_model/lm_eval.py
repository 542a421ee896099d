"""Tasks of lm-eval on an export or a checkpoint, with the results where people look for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relora_ds.checkpoint.export.card import CARD, with_scores
from relora_ds.engine.accelerator import check_accelerator
from relora_ds.engine.deepspeed.process_group import accelerator_type
from relora_ds.errors import ConfigError
from relora_ds.extras import require
from relora_ds.files.regular import read_regular
from relora_ds.model.hf.written import NAME as RECORD
from relora_ds.model.hf.written import Written
from relora_ds.train.saved_model.directory import as_directory
from relora_ds.train.saved_model.notes import note_in_summary
from relora_ds.train.telemetry.atomic import write_atomically

_MAX_BYTES = 64 << 20
KEY = "lm_eval"
"""Of `summary.json`."""


def run_tasks(
    path: Path,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 8,
    include: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Score a model, in fp32 and one process.

    The results go into the model card of an export, and into the `summary.json` of the run that the
    model lies in.

    Args:
        path: a Hugging Face directory, or a checkpoint, of which an export is made meanwhile.
        tasks: their names.
        limit: examples of each task; None for all.
        batch_size: sequences per forward pass.
        include: directory of further tasks.

    Returns:
        Value by metric by task.

    Raises:
        ConfigError: lm-eval is not installed, or a task is unknown or cannot be run.
        CheckpointError: the model cannot be read.
    """
    lm_eval, manager = _opened(tasks, include)
    check_accelerator()
    with as_directory(path) as model:
        try:
            found = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(model), "dtype": "float32"},
                tasks=list(tasks),
                limit=limit,
                batch_size=batch_size,
                device=accelerator_type(),
                task_manager=manager,
            )
        except (OSError, ValueError, LookupError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"lm-eval cannot run {' '.join(tasks)} ({type(error).__name__}: {reason}): where "
                "this machine has no network, put the task's data into its cache first"
            ) from error
    scores = _scores(found["results"])
    note_scores(path, scores)
    return scores


def _opened(tasks: Sequence[str], include: Path | None) -> tuple[Any, Any]:
    """The package and what knows its tasks, of which all that are asked for are there.

    Raises:
        ConfigError: lm-eval is not installed, or does not know a task.
    """
    packages = {"lm_eval": "lm_eval[hf]", "transformers": "transformers"}
    lm_eval, _ = (require(module, name, "--lm-eval") for module, name in packages.items())
    manager = require("lm_eval.tasks", "lm_eval[hf]", "--lm-eval").TaskManager(
        include_path=None if include is None else str(include)
    )
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"--lm-eval {' '.join(unknown)}: lm-eval has no such task; `lm-eval ls tasks` lists "
            "those that it has"
        )
    return lm_eval, manager


def _scores(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Numbers by metric, without lm-eval's names of tasks and without errors that are unknown."""
    return {
        task: {
            metric.removesuffix(",none"): float(value)
            for metric, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for task, values in results.items()
    }


def note_scores(path: Path, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Write scores into a model's card and into the summary of its run, where there are any.

    Args:
        path: the model.
        scores: value by metric by task.
    """
    card = path / CARD
    if (path / "config.json").is_file() and card.is_file():
        rows = [(task, metric, v) for task, all_ in scores.items() for metric, v in all_.items()]
        before = read_regular(card, _MAX_BYTES)
        text = with_scores(before.decode(errors="surrogateescape"), rows)  # of any encoding
        after = text.encode(errors="surrogateescape")
        write_atomically(card, after)
        record = path / RECORD
        if record.is_file():
            written = Written.recorded_in(path).rewritten(CARD, before, after)
            write_atomically(record, written.dump())
    note_in_summary(path, KEY, scores)
