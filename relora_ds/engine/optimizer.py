"""The client optimizer that DeepSpeed drives: element-wise, or matrix-wise for some groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from relora_ds.config.sections import OptimizerConfig
from relora_ds.engine.deepspeed.optimizers import cpu_adam, fused_adam
from relora_ds.methods.interface import ParameterGroup
from relora_ds.optim.block_adamw import BlockAdamW
from relora_ds.optim.grouped import GroupedOptimizer
from relora_ds.optim.matrix import MatrixOptimizer
from relora_ds.optim.vector_adamw import VectorAdamW


def build_optimizer(
    config: OptimizerConfig,
    groups: Sequence[ParameterGroup],
    rules: Mapping[nn.Parameter, MatrixOptimizer],
) -> torch.optim.Optimizer:
    """The configured AdamW over the method's groups, but for those with a rule of their own.

    Every group carries its `role`, from which the learning rate is set before each update. It
    starts at zero: DeepSpeed's bf16 stage 0 takes a step on zero gradients when it is built.

    Args:
        config: names the element-wise optimizer.
        groups: what is trained.
        rules: the matrix-wise optimizer of every parameter that has one; whole groups have one.
    """
    settings = {"betas": config.betas, "eps": config.eps}
    described: list[dict[str, Any]] = [
        {
            "params": list(group.parameters),
            "role": group.role,
            "lr": 0.0,
            "weight_decay": config.weight_decay if group.decays else 0.0,
        }
        for group in groups
    ]
    if not rules:
        return _KINDS[config.name](described, settings)
    assert config.name == "adamw", "requirements were checked"
    for description in described:
        ruled = [parameter in rules for parameter in description["params"]]
        assert all(ruled) or not any(ruled), "a group is updated in one way"
        description["matrix_wise"] = ruled[0]
    return GroupedOptimizer(described, **settings)


@contextmanager
def unapplied(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, a step of the optimizer changes nothing: neither what it steps nor its state.

    What drives it does the rest of a step: it lets go of the gradients and begins a new update.
    """
    vars(optimizer)["step"] = lambda *args, **settings: None  # hides the method of the class
    try:
        yield
    finally:
        del vars(optimizer)["step"]


def _vector_adamw(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    return VectorAdamW(groups, **settings)


def _block_adamw(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    return BlockAdamW(groups, **settings)


def _torch_adamw(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **settings)


_KINDS: dict[str, Callable[[list[dict[str, Any]], dict[str, Any]], torch.optim.Optimizer]] = {
    "adamw": _vector_adamw,
    "adamw8bit": _block_adamw,
    "torch_adamw": _torch_adamw,
    "fused_adam": fused_adam,
    "cpu_adam": cpu_adam,
}
