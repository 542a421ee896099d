"""What a finished run left behind, as a record."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path

import torch

import relora_ds
from benchmarks.trials.ledger import Record, Trial
from relora_ds.errors import ReloraError
from relora_ds.model.hf.weights import read_hf
from relora_ds.train.telemetry.sinks.base import read_metrics

_POINTS = 33
"""Of a spectrum."""


def find_record(
    directory: Path,
    trial: Trial,
    setting: str,
    spent: Mapping[str, float] | None,
    *,
    diverged: bool,
) -> Record:
    """The record of a run that has ended.

    Args:
        directory: its `output_dir`.
        setting: of its description.
        spent: `cpu_seconds` and `wall_seconds`, None if they are not known.
        diverged: whether it ended for that reason.

    Raises:
        ReloraError: it has no perplexity.
    """
    summary = json.loads((directory / "summary.json").read_bytes())
    perplexity = summary["final"].get("eval/perplexity")
    if perplexity is None and not diverged:
        raise ReloraError(f"{directory} ended without a perplexity: data.valid is needed")
    reports = read_metrics(directory / "metrics.jsonl")
    evaluated = {r["step"]: r["eval/perplexity"] for r in reports if "eval/perplexity" in r}
    exported = directory / "hf"
    rank, spectrum = spectra(exported) if exported.is_dir() and not diverged else (None, [])
    return Record(
        *trial,
        setting,
        None if diverged else perplexity,
        **(spent or {}),
        curve=sorted(evaluated.items()),
        effective_rank=rank,
        spectrum=spectrum,
        versions={
            "relora_ds": relora_ds.__version__,
            "torch": importlib.metadata.version("torch"),
        },
    )


@torch.no_grad()
def spectra(exported: Path) -> tuple[float, list[float]]:
    """Mean effective rank and mean spectrum of an exported model's projections.

    The effective rank is exp of the entropy of singular values over their sum, as a share of the
    smaller side. A spectrum is sampled at equal distances, over its largest value.
    """
    _, weights = read_hf(exported)
    ranks, curves = [], []
    for name in weights:
        if not name.endswith("_proj.weight"):
            continue
        values = torch.linalg.svdvals(weights[name].float())
        shares = values / values.sum()
        entropy = torch.special.entr(shares).sum()
        ranks.append(entropy.exp() / len(values))
        at = torch.linspace(0, len(values) - 1, _POINTS).round().long()
        curves.append((values / values[0])[at])
    spectrum = torch.stack(curves).mean(0)
    return float(torch.stack(ranks).mean()), [round(value, 5) for value in spectrum.tolist()]
