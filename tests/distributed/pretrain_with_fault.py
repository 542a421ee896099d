"""launch/pretrain.py on a machine whose rank 1 loses a bit of a weight right after a switch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from relora_ds.methods.adapter import adapter_layers
from relora_ds.methods.switchlora.switchlora import SwitchLoRA
from relora_ds.train.main import main

_FAULT_AT = 5


class _Faulty(SwitchLoRA):
    def before_step(self, state: Any, model: torch.nn.Module, step: int) -> None:
        super().before_step(state, model, step)
        if step == _FAULT_AT and os.environ["RANK"] == "1":
            *_, layer = adapter_layers(model).values()
            layer.weight.data.view(-1).view(torch.int32)[7] ^= 1


if __name__ == "__main__":
    from relora_ds.methods import registry

    registry.METHODS["switchlora"] = _Faulty
    sys.exit(main(sys.argv[1:]))
