"""Settings that LoRA and everything built on it share. Defaults are LoRA's."""

from __future__ import annotations

from typing import Literal

from relora_ds.config.base import PositiveFloat
from relora_ds.config.methods.base import WithFactors


class AdapterConfig(WithFactors):
    """Trained adapters on a frozen base weight: every projection is W + scale * B @ A."""

    alpha: PositiveFloat | None = None
    """Numerator of the adapter scale alpha / rank. Default: 32, or 1 with `init: balanced`."""
    init: Literal["kaiming", "balanced"] = "kaiming"
    """How factors start. `kaiming`: A uniform on +-1/sqrt(in_features), B zero. `balanced`: both
    non-zero as in SwitchLoRA (section 3 of its paper), the base weight absorbs -scale * B @ A."""
    trainable_scaling: bool = False
    """Replace alpha / rank by tanh(sigma) with one trained sigma per projection. It starts at 1 and
    returns to 1 at every restart (the authors' code sets it to 0, which kills the adapter)."""

    @property
    def scale(self) -> float:
        """alpha / rank with the default alpha of the chosen initialisation."""
        alpha = self.alpha if self.alpha is not None else (1.0 if self.init == "balanced" else 32.0)
        return alpha / self.rank

    @property
    def has_frozen_base(self) -> bool:
        return True

    @property
    def moves_pairs(self) -> bool:
        return True
