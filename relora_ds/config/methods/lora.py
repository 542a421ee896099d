"""Settings of LoRA from scratch."""

from __future__ import annotations

from typing import ClassVar, Literal

from relora_ds.config.methods.adapter import AdapterConfig
from relora_ds.config.methods.base import WarmStarted
from relora_ds.config.methods.catalogue import register_settings


@register_settings
class LoRAConfig(WarmStarted, AdapterConfig):
    """LoRA from scratch: adapters on a frozen base that never changes (Hu et al., 2021)."""

    title: ClassVar[str | None] = "LoRA from scratch"

    name: Literal["lora"]
    """Chooses this method."""
