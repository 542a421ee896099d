"""What a run leaves behind when it ends: plot, export and summary."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

import torch

from relora_ds.checkpoint.export import export_hf
from relora_ds.config.schema import RunConfig
from relora_ds.data.batches import unigram_perplexity
from relora_ds.methods.registry import plan_phases
from relora_ds.train.loop import Trainer
from relora_ds.train.telemetry.plot import plot_run
from relora_ds.train.telemetry.sinks.base import Status
from relora_ds.train.telemetry.summary import write_summary

_logger = logging.getLogger(__name__)


def warn_of_missing_export(config: RunConfig) -> None:
    """Say before training if the trained model will have no dense equivalent to export."""
    if not _exports(config):
        _logger.warning(
            "method.name is %s, whose projections have no dense equivalent: the run ends without a "
            "Hugging Face export; resume and evaluate its checkpoints instead",
            config.method.name,
        )


def write_results(
    trainer: Trainer, status: Status, reason: str | None, started_at: datetime
) -> None:
    """Plot, export and summary; rank 0 only."""
    config, output_dir = trainer.config, Path(trainer.config.output_dir)
    final = dict(trainer.final)
    if trainer.valid_data is not None and trainer.corpus.valid is not None:
        final["data/unigram_perplexity"] = unigram_perplexity(
            trainer.corpus.valid, config.train.seq_length, trainer.valid_data.num_sequences
        )
    write_summary(
        output_dir / "summary.json",
        status=status,
        figures=final,
        config=config,
        world_size=trainer.topology.world_size,
        started_at=started_at,
        data_fingerprints={file.prefix: file.fingerprint for file in trainer.corpus.files},
        tokenizer_sha256=trainer.corpus.train[0].tokenizer_sha256,
        reason=reason,
    )
    metrics = output_dir / "metrics.jsonl"
    if metrics.is_file() and metrics.stat().st_size:
        plot_run(metrics, output_dir / "plots" / "loss.png")
    if status != "completed":
        return
    place = output_dir / ("hf" if _exports(config) else "checkpoints")
    if _exports(config):
        export_hf(output_dir / "checkpoints", place, torch.float32)
    _logger.info(
        "done: validation perplexity %.2f (unigram %.1f), model in %s",
        final.get("eval/perplexity", float("nan")),
        final.get("data/unigram_perplexity", float("nan")),
        place,
    )


def _exports(config: RunConfig) -> bool:
    return plan_phases(config)[-1].method.has_dense_weight
