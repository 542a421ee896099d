"""A saved state cut for a tensor-parallel group and put together again is what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from relora_ds.checkpoint.inventory import take_inventory
from relora_ds.checkpoint.saved_state import SavedState
from relora_ds.checkpoint.tp_state import JoinedState, PartOfState
from relora_ds.config.methods.relora import ReLoRAConfig
from relora_ds.config.methods.sltrain import SLTrainConfig
from relora_ds.config.methods.switchlora import SwitchLoRAConfig
from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import OptimizerConfig, ParallelConfig, TrainConfig
from relora_ds.methods.build import sharded_meta_model, shards_of
from relora_ds.methods.interface import Method
from relora_ds.methods.relora.relora import ReLoRA
from relora_ds.methods.sltrain.sltrain import SLTrain
from relora_ds.methods.switchlora.switchlora import SwitchLoRA
from relora_ds.optim.vector_adamw import MOMENTS
from relora_ds.parallel.tensor import SINGLE, TensorParallel
from relora_ds.parallel.topology import part_of_model

ARCHITECTURE = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=41,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=6,
    max_position_embeddings=32,
    attention_bias=True,
)
TRAIN = TrainConfig(
    steps=5, seq_length=8, micro_batch_size=1, global_batch_size=1, precision="fp32"
)
RELORA = ReLoRAConfig(name="relora", rank=8, merge_every=3, restart_warmup_steps=1)
METHODS: dict[str, Method[Any]] = {
    "relora": ReLoRA(RELORA, seed=1, steps=5),
    "switchlora": SwitchLoRA(SwitchLoRAConfig(name="switchlora", rank=8), seed=1, steps=5),
    "sltrain": SLTrain(SLTrainConfig(name="sltrain", rank=8, sparsity=0.1), seed=1, steps=5),
}
KINDS = ("master", *MOMENTS)


class InMemory(SavedState):
    """Random values of a whole model."""

    def __init__(self, method: Method[Any]) -> None:
        model = sharded_meta_model(ARCHITECTURE, method, TRAIN, SINGLE)
        inventory = take_inventory(model, method, "working", torch.float32, OptimizerConfig())
        super().__init__(inventory, 3, {}, {})
        known = self.inventory
        self._values = {("frozen", n): torch.randn(s) for n, s in known.frozen.items()}
        for kind in KINDS:
            self._values |= {(kind, n): torch.randn(s) for n, s in known.trained.items()}

    def read(self, kind: str, name: str, start: int, length: int) -> torch.Tensor:
        return self._values[kind, name].view(-1)[start : start + length]

    def frozen(self, name: str, start: int, length: int) -> torch.Tensor:
        return self.read("frozen", name, start, length)


def cut(state: SavedState, method: Method[Any], plan: str, size: int) -> SavedState:
    """The state as the ranks of a group would save it, joined again."""
    parallel = ParallelConfig(tensor=size, low_rank_plan=plan)  # type: ignore[arg-type]
    groups: list[TensorParallel] = [part_of_model(parallel, rank) for rank in range(size)]
    shards = [shards_of(sharded_meta_model(ARCHITECTURE, method, TRAIN, group)) for group in groups]
    parts = [PartOfState(state, of_rank) for of_rank in shards]
    if plan == "act":
        whole = sum(shape.numel() for shape in state.inventory.trained.values())
        held = max(sum(s.numel() for s in part.inventory.trained.values()) for part in parts)
        assert held < 1.2 * whole / size  # norms, row biases and uneven cuts apart
    return JoinedState(state.inventory, parts, shards)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("plans", [("act", "act"), ("act", "fold"), ("fold", "act")])
def test_2_to_4_to_1(name: str, plans: tuple[str, str]) -> None:
    torch.manual_seed(0)
    method = METHODS[name]
    whole = InMemory(method)
    found = cut(cut(whole, method, plans[0], 2), method, plans[1], 4)
    for kind in KINDS:
        for parameter, shape in whole.inventory.trained.items():
            expected = whole.read(kind, parameter, 0, shape.numel())
            assert torch.equal(found.read(kind, parameter, 0, shape.numel()), expected), parameter
    for parameter, shape in whole.inventory.frozen.items():
        expected = whole.frozen(parameter, 0, shape.numel())
        assert torch.equal(found.frozen(parameter, 0, shape.numel()), expected), parameter
