"""Settings of factorised training from scratch."""

from __future__ import annotations

from typing import ClassVar, Literal

from relora_ds.config.methods.base import WithFactors
from relora_ds.config.methods.catalogue import register_settings


@register_settings
class LowRankConfig(WithFactors):
    """Factorised training from scratch: the projection *is* B @ A, there is no dense weight."""

    title: ClassVar[str | None] = "low-rank factors"

    name: Literal["low_rank"]
    """Chooses this method."""
    init: Literal["spectral", "svd", "xavier"] = "spectral"
    """How factors start. `svd`: the truncated SVD of a dense weight, singular values split evenly
    between them (Khodak et al., 2021); of random weights at 1.3B that takes eight minutes on one
    CPU core. `spectral`: the same, except that the truncated SVD of a random weight with more than
    768 rows and columns is drawn without the weight, in seconds. `xavier`: each factor drawn on its
    own."""

    @property
    def moves_pairs(self) -> bool:
        return True
