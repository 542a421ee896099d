"""launch/pretrain.py on a machine whose rank 1 loses a bit of a weight right after a switch."""

from __future__ import annotations

import os
import sys

import torch

from relora_ds.methods.adapter import adapter_layers
from relora_ds.methods.switchlora.switchlora import SwitchLoRA, SwitchLoRASession
from relora_ds.methods.train_state import TrainState
from relora_ds.train.main import main

_FAULT_AT = 5


class _FaultySession(SwitchLoRASession):
    def before_step(self, step: int) -> None:
        super().before_step(step)
        if step == _FAULT_AT and os.environ["RANK"] == "1":
            *_, layer = adapter_layers(self.model).values()
            layer.weight.data.view(-1).view(torch.int32)[7] ^= 1


class _Faulty(SwitchLoRA):
    def start(self, state: TrainState, model: torch.nn.Module) -> SwitchLoRASession:
        return _FaultySession(self, state, model)


if __name__ == "__main__":
    from relora_ds.methods import registry

    registry.METHODS["switchlora"] = _Faulty
    sys.exit(main(sys.argv[1:]))
