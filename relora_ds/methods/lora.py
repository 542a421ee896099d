"""LoRA from scratch: adapters on a frozen base that never changes."""

from __future__ import annotations

from torch import nn

from relora_ds.config.methods.lora import LoRAConfig
from relora_ds.config.sections import OptimizerConfig
from relora_ds.methods.adapter import AdapterMethod
from relora_ds.methods.interface import pair_rule
from relora_ds.optim.matrix import MatrixOptimizer


class LoRA(AdapterMethod[LoRAConfig]):
    """What `AdapterMethod` says; no events."""

    def matrix_optimizer(
        self, settings: OptimizerConfig, name: str, parameter: nn.Parameter
    ) -> MatrixOptimizer | None:
        return pair_rule(settings, name, self.config.scale)
