"""What a run leaves behind when it ends: plot, export and summary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from relora_ds.activity import doing
from relora_ds.checkpoint.export.hf import export_hf
from relora_ds.checkpoint.format import layout
from relora_ds.config.schema import RunConfig
from relora_ds.data.batches import DocumentBatches, ValidationBatches, unigram_perplexity
from relora_ds.data.source import Corpus
from relora_ds.errors import ReloraError
from relora_ds.files.durable import describe, remedy
from relora_ds.files.objects import read_object
from relora_ds.methods.registry import plan_phases
from relora_ds.model.hf.directory import check_target, recover_export
from relora_ds.train.telemetry.plot import has_losses, plot_run
from relora_ds.train.telemetry.sinks.base import Status, last_figures, read_metrics
from relora_ds.train.telemetry.summary import write_summary

_logger = logging.getLogger(__name__)
_HF = "hf"


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: Status
    reason: str | None
    """Why it did not complete; None if it did."""
    started_at: datetime
    world_size: int
    """Processes that took part."""
    final: Mapping[str, Any]
    """Last value of each metric."""


def warn_of_missing_export(config: RunConfig) -> None:
    """Say before training if the trained model will have no dense equivalent to export."""
    if not _exports(config):
        _logger.warning(
            "method.name is %s, whose projections have no dense equivalent: the run ends without a "
            "Hugging Face export; resume and evaluate its checkpoints instead",
            config.method.name,
        )


def recover_results(config: RunConfig) -> None:
    """Undo what an export of an earlier process left that was killed; by the main process.

    What cannot be undone is logged: the next export meets it again, and a run can do without.
    """
    target = Path(config.output_dir) / _HF
    try:
        recover_export(target)
    except OSError as error:
        _logger.warning("%s, which a killed export left; %s", describe(error), remedy(error))


def check_export_target(config: RunConfig) -> None:
    """Make sure before training that the export will have a place.

    Raises:
        ConfigError: `hf/` holds files that are not an earlier export.
    """
    if _exports(config):
        check_target(Path(config.output_dir) / _HF)


def are_complete(config: RunConfig) -> bool:
    """Whether everything that a completed run leaves behind is there."""
    output_dir = Path(config.output_dir)
    summary = _earlier_summary(output_dir).get("status") == "completed"
    return summary and (not _exports(config) or (output_dir / _HF).is_dir())


def write_results(
    outcome: Outcome,
    config: RunConfig,
    corpus: Corpus,
    valid_data: ValidationBatches | DocumentBatches | None,
) -> list[ReloraError]:
    """Write plot, summary and, of a completed run, the export; on rank 0 only.

    Returns:
        What could not be written, and why. The rest was: none of these hides how the run ended.
    """
    output_dir, final = Path(config.output_dir), dict(outcome.final)
    steps: list[tuple[str, Callable[[], None]]] = [
        ("summary", lambda: _write_summary(outcome, final, config, corpus, valid_data)),
        ("plot", lambda: _plot(output_dir)),
    ]
    exports = outcome.status == "completed" and _exports(config)
    if exports:
        place = output_dir / layout.CHECKPOINTS, output_dir / _HF
        steps.append(("export", lambda: export_hf(*place, torch.float32)))
    problems: list[ReloraError] = []
    for what, write in steps:
        try:
            with doing(what):
                write()
        except (ReloraError, OSError) as error:
            problems.append(_as_problem(what, error, output_dir))
    if outcome.status == "completed" and not problems:
        unigram = final.get("data/unigram_perplexity")
        _logger.info(
            "done: validation perplexity %.2f%s, model in %s",
            final.get("eval/perplexity") or float("nan"),
            "" if unigram is None else f" (unigram {unigram:.1f})",
            output_dir / (_HF if exports else layout.CHECKPOINTS),
        )
    return problems


def _write_summary(
    outcome: Outcome,
    final: dict[str, Any],
    config: RunConfig,
    corpus: Corpus,
    valid_data: ValidationBatches | DocumentBatches | None,
) -> None:
    """Write `summary.json`; what is derived from the data is added to `final`."""
    if isinstance(valid_data, ValidationBatches) and corpus.validation is not None:
        final["data/unigram_perplexity"] = unigram_perplexity(
            corpus.validation,
            config.train.seq_length,
            valid_data.num_sequences,
            corpus.document_end,
        )
    write_summary(
        Path(config.output_dir) / "summary.json",
        status=outcome.status,
        figures=final,
        config=config,
        world_size=outcome.world_size,
        started_at=outcome.started_at,
        data_fingerprints={file.prefix: file.fingerprint for file in corpus.files},
        tokenizer_sha256=corpus.train[0].tokenizer_sha256,
        reason=outcome.reason,
    )


def _plot(output_dir: Path) -> None:
    metrics = output_dir / "metrics.jsonl"
    if metrics.is_file() and has_losses(read_metrics(metrics)):
        plot_run(metrics, output_dir / "plots" / "loss.png")


def _as_problem(what: str, error: ReloraError | OSError, output_dir: Path) -> ReloraError:
    if isinstance(error, ReloraError):
        return error
    return ReloraError(
        f"cannot write {error.filename or output_dir} ({what}): {error.strerror}; free some space "
        "or check its permissions, and start the same command again"
    )


def earlier_figures(output_dir: Path) -> dict[str, Any]:
    """Figures of a run so far, from what it left behind."""
    earlier = _earlier_summary(output_dir).get("final")
    known = earlier if isinstance(earlier, dict) else {}
    return known | last_figures(output_dir / "metrics.jsonl")


def _earlier_summary(output_dir: Path) -> dict[str, Any]:
    return read_object(output_dir / "summary.json") or {}


def _exports(config: RunConfig) -> bool:
    return plan_phases(config)[-1].method.has_dense_weight
