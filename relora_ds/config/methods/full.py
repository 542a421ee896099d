"""Settings of full-rank training."""

from __future__ import annotations

from typing import ClassVar, Literal

from relora_ds.config.methods.base import MethodSettings
from relora_ds.config.methods.catalogue import register_settings


@register_settings
class FullConfig(MethodSettings):
    """Full-rank training: every weight is trained. The baseline of every comparison."""

    title: ClassVar[str | None] = "full-rank training"

    name: Literal["full"]
    """Chooses this method."""

    @property
    def trains_projections(self) -> bool:
        return True
