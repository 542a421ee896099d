"""What a run leaves behind when it ends: plot, export and summary."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from relora_ds.activity import doing
from relora_ds.checkpoint.export import export_hf
from relora_ds.checkpoint.format import layout
from relora_ds.config.schema import RunConfig
from relora_ds.data.batches import ValidationBatches, unigram_perplexity
from relora_ds.data.source import Corpus
from relora_ds.methods.registry import plan_phases
from relora_ds.train.telemetry.plot import plot_run
from relora_ds.train.telemetry.sinks.base import Status
from relora_ds.train.telemetry.summary import write_summary

_logger = logging.getLogger(__name__)


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


def write_results(
    outcome: Outcome, config: RunConfig, corpus: Corpus, valid_data: ValidationBatches | None
) -> None:
    """Write plot, summary and, of a completed run, the export; on rank 0 only."""
    output_dir, final = Path(config.output_dir), dict(outcome.final)
    if valid_data is not None and corpus.valid is not None:
        final["data/unigram_perplexity"] = unigram_perplexity(
            corpus.valid, config.train.seq_length, valid_data.num_sequences
        )
    write_summary(
        output_dir / "summary.json",
        status=outcome.status,
        figures=final,
        config=config,
        world_size=outcome.world_size,
        started_at=outcome.started_at,
        data_fingerprints={file.prefix: file.fingerprint for file in corpus.files},
        tokenizer_sha256=corpus.train[0].tokenizer_sha256,
        reason=outcome.reason,
    )
    metrics = output_dir / "metrics.jsonl"
    if metrics.is_file() and metrics.stat().st_size:
        plot_run(metrics, output_dir / "plots" / "loss.png")
    if outcome.status != "completed":
        return
    checkpoints, hf = output_dir / layout.CHECKPOINTS, output_dir / "hf"
    exports = _exports(config)
    if exports:
        with doing("export"):
            export_hf(checkpoints, hf, torch.float32)
    _logger.info(
        "done: validation perplexity %.2f (unigram %.1f), model in %s",
        final.get("eval/perplexity", float("nan")),
        final.get("data/unigram_perplexity", float("nan")),
        hf if exports else checkpoints,
    )


def _exports(config: RunConfig) -> bool:
    return plan_phases(config)[-1].method.has_dense_weight
