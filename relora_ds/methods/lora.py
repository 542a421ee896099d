"""LoRA from scratch: adapters on a frozen base that never changes."""

from __future__ import annotations

from relora_ds.config.methods.lora import LoRAConfig
from relora_ds.methods.adapter import AdapterMethod


class LoRA(AdapterMethod[LoRAConfig]):
    """What `AdapterMethod` says; no events."""
