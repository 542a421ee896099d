"""Rules on what updates matrices and pairs of factors."""

from __future__ import annotations

from collections.abc import Iterator

from relora_ds.config.methods.base import MethodSettings
from relora_ds.config.model import ModelConfig
from relora_ds.config.reading.document import Finding
from relora_ds.config.sections import OptimizerConfig


def matrices_are_trained(method: MethodSettings, optimizer: OptimizerConfig) -> Iterator[Finding]:
    if optimizer.matrix != "muon" or method.trains_projections or method.warm_start is not None:
        return
    yield Finding(
        ("optimizer", "matrix"),
        f"is muon, which updates the weights of projections, but method {method.name} does not "
        "train them: remove it, use method.name=full, or start with method.warm_start_steps",
    )


def pairs_are_moved(method: MethodSettings, optimizer: OptimizerConfig) -> Iterator[Finding]:
    if optimizer.adapter is not None and not method.moves_pairs:
        yield Finding(
            ("optimizer", "adapter"),
            f"is {optimizer.adapter}, which updates both factors of a projection as one, but "
            f"method {method.name} trains no factors: remove it, or use another method.name",
        )


def pairs_have_their_own_rate(
    method: MethodSettings, optimizer: OptimizerConfig
) -> Iterator[Finding]:
    """AdamW's rates for factors are several times smaller than those of spectral updates."""
    given, usual = optimizer.adapter_lr, optimizer.spectral.default_lr(method.spectral_lr)
    if optimizer.adapter is None or optimizer.spectral.lr is not None or given is None:
        return
    if given < 0.4 * usual:
        yield Finding(
            ("optimizer", "adapter_lr"),
            f"is {given:g}, and without optimizer.spectral.lr that is the rate of the factors, "
            f"which want about {usual:g} under spectral updates: set optimizer.spectral.lr",
        )


def scaled_head_is_free(optimizer: OptimizerConfig, architecture: ModelConfig) -> Iterator[Finding]:
    if optimizer.matrix == "scale" and architecture.tie_word_embeddings:
        yield Finding(
            ("optimizer", "matrix"),
            "is scale, which normalises embedding and head along different dimensions, but the "
            "model ties them: write tie_word_embeddings: false in the model file, or use muon",
        )
