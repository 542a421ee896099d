"""torch's types by the names that run files and DeepSpeed's JSON give them."""

from __future__ import annotations

from typing import Literal

import torch

DTYPES: dict[Literal["fp32", "bf16"], torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}
