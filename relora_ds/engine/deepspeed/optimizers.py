"""DeepSpeed's own Adam kernels. Imported late: the first use of each compiles it."""

from __future__ import annotations

from typing import Any

import torch


def fused_adam(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW in one kernel for many tensors.

    Args:
        groups: parameter groups, each with its learning rate and weight decay.
        settings: `betas` and `eps`.
    """
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(groups, adam_w_mode=True, **settings)


def cpu_adam(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW on the host, for states that are offloaded.

    Args:
        groups: parameter groups, each with its learning rate and weight decay.
        settings: `betas` and `eps`.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
