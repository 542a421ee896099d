"""Small adapted models and the settings they are built from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from relora_ds.config.methods.relora import ReLoRAConfig
from relora_ds.methods.relora.relora import ReLoRA
from relora_ds.parallel.linear import LinearSpec

SHAPES = {"first": (20, 12), "second": (12, 20), "third": (16, 16)}
"""(out, in) of each projection."""


@pytest.fixture
def spec() -> Callable[..., LinearSpec]:
    """Describes a projection of 12 inputs and 20 outputs, or as given."""

    def make(rows: int = 20, cols: int = 12, bias: bool = False, name: str = "a.q") -> LinearSpec:
        return LinearSpec(name, cols, rows, bias, "column")

    return make


@pytest.fixture
def relora() -> Callable[..., tuple[ReLoRA, nn.ModuleDict]]:
    """Builds ReLoRA (rank 4, a merge every 10 of 100 steps) and three initialised projections."""

    def make(**settings: Any) -> tuple[ReLoRA, nn.ModuleDict]:
        values = {"name": "relora", "rank": 4, "alpha": 8, "merge_every": 10, **settings}
        method = ReLoRA(ReLoRAConfig.model_validate(values), seed=42, steps=100)
        model = nn.ModuleDict()
        generator = torch.Generator().manual_seed(0)
        for name, (rows, cols) in SHAPES.items():
            layer = method.linear(LinearSpec(name, cols, rows, False, "column"))
            with torch.no_grad():
                method.initialize(layer, torch.randn(rows, cols, generator=generator))
            model[name] = layer
        return method, model

    return make
