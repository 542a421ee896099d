"""Golden counts of the step path: no wait for the device, no mixing of devices, bounded launches.

`meta` stands for the GPU in torch's fake mode: reading a value raises, and so does an operation
whose tensors lie on different devices. Counts are upper limits: what lowers one should lower the
limit with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode

from relora_ds.config.methods.catalogue import MethodConfig
from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.methods.build import meta_model
from relora_ds.methods.interface import Method
from relora_ds.methods.registry import METHODS
from relora_ds.model.rope import rotary_tables
from relora_ds.numerics.base_weight import KINDS, apply_product, weight_times
from relora_ds.numerics.batched.fingerprints import fingerprint
from relora_ds.numerics.draws import draw_normal, draw_uniform
from relora_ds.numerics.rounding import round_at_random
from relora_ds.parallel.footprint import Formulation, UpdateSize
from relora_ds.parallel.linear import LinearSpec
from relora_ds.randomness import Stream

DEVICE = "meta"
TRAIN = TrainConfig(
    steps=10, seq_length=8, micro_batch_size=1, global_batch_size=1, attention="sdpa"
)
ARCHITECTURE = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=16,
)
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": 4},
    "low_rank": {"name": "low_rank", "rank": 4},
    "relora": {"name": "relora", "rank": 4},
    "sltrain": {"name": "sltrain", "rank": 4, "sparsity": 0.1},
    "switchlora": {"name": "switchlora", "rank": 3},
    "galore": {"name": "galore", "rank": 4},
}
LAUNCHES = {
    "full": (1, 2),
    "lora": (3, 8),
    "low_rank": (2, 4),
    "relora": (3, 8),
    "sltrain": (9, 21),
    "switchlora": (3, 8),
    "galore": (3, 6),
}
"""Kernels of one projection, forward and backward, at most."""
COMPOSED = {"lora": (1, 7), "relora": (1, 7), "sltrain": (1, 14), "switchlora": (1, 7)}
"""The same where the weight was composed before, for an earlier micro-batch of the update."""


def method_of(name: str) -> Method[Any]:
    config = TypeAdapter(MethodConfig).validate_python(SETTINGS[name])
    return METHODS[config.name](config, 42, 10)


@contextmanager
def on_the_device() -> Iterator[None]:
    rotary_tables.cache_clear()  # tensors of one fake mode are none of another
    try:
        with FakeTensorMode(), torch.device(DEVICE):
            yield
    finally:
        rotary_tables.cache_clear()


_FREE = ("prim::", "empty", "new_empty", "detach", "_unsafe_view")


class Launches(TorchDispatchMode):
    """Counts operations that compute or copy; views and allocations cost no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        free = func.is_view or name.startswith(_FREE)
        if not free:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_every_registered_method_is_covered() -> None:
    assert SETTINGS.keys() == LAUNCHES.keys() == METHODS.keys()


def test_the_detector_detects() -> None:
    with on_the_device():
        with pytest.raises((DataDependentOutputException, UnsupportedOperatorException)):
            torch.ones(3).sum().item()
        with pytest.raises(RuntimeError, match=r"on the same device|different devices"):
            torch.add(torch.ones(3), torch.ones(3, device="cpu"))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_waits_for_nothing(name: str, dtype: torch.dtype) -> None:
    with on_the_device():
        model = meta_model(ARCHITECTURE, method_of(name), TRAIN)
        for module in model.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                empty = torch.empty(parameter.shape, dtype=dtype)
                setattr(module, key, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        tokens = torch.zeros(2, 9, dtype=torch.int64)
        model(tokens).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained
        assert all(p.grad is not None and p.grad.device.type == DEVICE for p in trained)


@pytest.mark.parametrize("formulation", ["split", "step"])
@pytest.mark.parametrize("name", SETTINGS)
def test_launches_of_a_projection(name: str, formulation: Formulation) -> None:
    layer = method_of(name).linear(LinearSpec("layer", 16, 24, False, "column"))
    layer.to(DEVICE)
    for parameter in layer.parameters():
        parameter.requires_grad_(parameter.requires_grad)
    x = torch.empty(2, 8, 16, device=DEVICE, requires_grad=True)
    layer.begin_update(UpdateSize(16, 2, formulation=formulation, device="cuda"))
    if layer.describe(UpdateSize(16)) and formulation == "step":
        layer(x)
    with Launches() as forward:
        out = layer(x)
    grad = torch.empty_like(out)
    with Launches() as backward:
        out.backward(grad)
    found = len(forward.names), len(backward.names)
    limits = COMPOSED.get(name, LAUNCHES[name]) if formulation == "step" else LAUNCHES[name]
    assert found[0] <= limits[0], forward.names
    assert found[1] <= limits[1], backward.names
    assert found[0] >= 1
    assert found[1] >= 2


ROWS, COLS, RANK = 24, 16, 3


def _edit(kind: Any) -> None:
    working = torch.zeros(ROWS * COLS, dtype=torch.bfloat16)
    base = KINDS[kind](working, torch.zeros(ROWS * COLS))
    apply_product(base, working, 0, torch.zeros(ROWS, RANK), torch.zeros(RANK, COLS), 0.5)
    weight_times(base, working, 0, ROWS, torch.zeros(COLS, RANK))


def _rounding() -> None:
    out = torch.empty(64, dtype=torch.bfloat16)
    round_at_random(torch.zeros(64), out, Stream(1, "rounding"), 0)


def _draws() -> None:
    stream = Stream(1, "init")
    draw_normal(stream, 0, 100, DEVICE)
    draw_uniform(stream, 0, 100, DEVICE)
    stream.uniform_rows(torch.zeros(3, dtype=torch.int64), 16, 0, 16)


def _fingerprint() -> None:
    fingerprint(torch.zeros(8192))


PARTS: dict[str, tuple[Callable[[], None], int]] = {
    "edit, residual": (lambda: _edit("bf16_residual"), 30),
    "edit, fp32": (lambda: _edit("fp32"), 16),
    "edit, working": (lambda: _edit("working"), 12),
    "rounding": (_rounding, 35),
    "draws": (_draws, 187),
    "fingerprint": (_fingerprint, 23),
}
"""Other functions of the step path and of events, with their launches at most."""


@pytest.mark.parametrize("part", PARTS)
def test_the_rest_of_the_path_waits_for_nothing(part: str) -> None:
    call, limit = PARTS[part]
    with on_the_device(), Launches() as launches:
        call()
    assert 0 < len(launches.names) <= limit, (len(launches.names), launches.names)
