"""What optimizers and events ask of a device: launches, waits and blocking copies, as upper limits.

The limits are what was counted, and a little room. What lowers a count should lower its limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from relora_ds.config.methods.catalogue import MethodConfig
from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.engine.zero.layout import WholeParameters
from relora_ds.engine.zero.state import ZeroState
from relora_ds.methods.build import meta_model
from relora_ds.methods.interface import Session, projection_layers
from relora_ds.methods.registry import METHODS
from relora_ds.numerics.base_weight import KINDS
from relora_ds.optim.block_adamw import BlockAdamW
from relora_ds.optim.grouped import GroupedOptimizer, PlacedMatrix
from relora_ds.optim.matrix import MatrixOptimizer, MatrixSlice, OfWhole
from relora_ds.optim.muon import Muon
from relora_ds.optim.rectangles import Rectangle
from relora_ds.optim.scale import Scale
from relora_ds.optim.vector_adamw import MOMENTS, VectorAdamW, storage_key
from relora_ds.optim.vector_clock import Fragment, VectorClock
from relora_ds.randomness import Stream
from tests.harness.device_costs import DEVICE, Costs, MixedDevicesError, SimulatedDevice

ROWS, COLS = 12, 16


def test_the_device_counts_and_refuses() -> None:
    device = SimulatedDevice(3.0)
    with device:
        here, there = torch.zeros(2, device=DEVICE), torch.zeros(2)
        assert (here + here).sum().item() == 3.0
        assert here.cpu().tolist() == [3.0, 3.0]
        there.to(DEVICE)
        here[torch.tensor([0])] = 1.0
        here.copy_(there, non_blocking=True)
        there.copy_(here, non_blocking=True)
        here.mul_(torch.tensor(2.0))  # a number, which a launch takes along
        with pytest.raises(MixedDevicesError):
            torch.add(here, there)
    assert device.costs == Costs(
        launches=["zeros", "add", "sum", "scalar_tensor", "index_put_", "mul_"],
        waits=["_local_scalar_dense", "_to_copy"],
        blocking=["upload", "index_put_"],
        queued=["upload", "copy_"],
    )


def stepped(optimizer: VectorAdamW) -> Costs:
    """The costs of the second update: the first one makes the state."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    with SimulatedDevice():
        optimizer.step()
    return costs_of(optimizer.step)


def _adamw(kind: type[VectorAdamW], dtype: torch.dtype, mixed: bool) -> VectorAdamW:
    p = nn.Parameter(torch.empty(ROWS, COLS, dtype=dtype, device=DEVICE))
    optimizer = kind([p], weight_decay=0.1)
    clock = VectorClock(ROWS, 0)
    if mixed:
        clock.freeze(5, torch.tensor([3]))
    optimizer.fragments = {storage_key(p): [Fragment(0, 0, p.numel(), clock, COLS)]}
    optimizer.roundings = {storage_key(p): Stream(1, "rounding", "p")}
    return optimizer


class _Alone:
    """Answers what matrices ask for, on a device that holds all of them."""

    def sums(
        self, matrices: Sequence[MatrixSlice], values: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        return list(values)

    def of_wholes(
        self, matrices: Sequence[MatrixSlice], requests: Sequence[OfWhole]
    ) -> list[torch.Tensor]:
        shape = 1, ROWS, COLS
        return [each.function(each.values.view(shape)).view(-1) for each in requests]


def _grouped(rule: MatrixOptimizer) -> VectorAdamW:
    p = nn.Parameter(torch.empty(ROWS, COLS, device=DEVICE))
    optimizer = GroupedOptimizer([{"params": [p], "matrix_wise": True}])
    shape = torch.Size((ROWS, COLS))
    state = {key: torch.zeros(shape.numel(), device=DEVICE) for key in rule.state(shape)}
    whole = (Rectangle(0, 0, 0, ROWS, COLS),)
    placed = PlacedMatrix(MatrixSlice("p", shape, whole, True, state), rule, 0)
    optimizer.matrices, optimizer.exchange = {storage_key(p): [placed]}, _Alone()
    return optimizer


OPTIMIZERS: dict[str, tuple[Callable[[], VectorAdamW], int, int]] = {
    "fp32": (lambda: _adamw(VectorAdamW, torch.float32, False), 3, 0),
    "fp32, mixed ages": (lambda: _adamw(VectorAdamW, torch.float32, True), 11, 1),
    "bf16": (lambda: _adamw(VectorAdamW, torch.bfloat16, False), 40, 0),
    "bf16, mixed ages": (lambda: _adamw(VectorAdamW, torch.bfloat16, True), 48, 1),
    "codes, fp32": (lambda: _adamw(BlockAdamW, torch.float32, False), 38, 0),
    "codes, bf16": (lambda: _adamw(BlockAdamW, torch.bfloat16, False), 75, 0),
    "muon": (lambda: _grouped(Muon()), 32, 0),
    "scale": (lambda: _grouped(Scale()), 11, 0),
    "scale, momentum": (lambda: _grouped(Scale(momentum=0.9)), 12, 0),
}
"""Kernels and queued copies of one update of one stretch, at most."""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_waits_for_nothing(name: str) -> None:
    build, launches, queued = OPTIMIZERS[name]
    costs = stepped(build())
    assert not costs.waits
    assert 0 < len(costs.launches) <= launches, (len(costs.launches), costs.launches)
    assert not costs.blocking
    assert len(costs.queued) <= queued, costs.queued


ARCHITECTURE = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=16,
)
TRAIN = TrainConfig(
    steps=10, seq_length=8, micro_batch_size=1, global_batch_size=1, attention="sdpa"
)
SETTINGS: dict[str, dict[str, Any]] = {
    "relora, zero": {"name": "relora", "rank": 4, "merge_every": 4, "reset": {"mode": "zero"}},
    "relora, random": {"name": "relora", "rank": 4, "merge_every": 4, "reset": {"mode": "random"}},
    "relora, magnitude": {
        "name": "relora",
        "rank": 4,
        "merge_every": 4,
        "reset": {"mode": "magnitude"},
    },
    "switchlora": {
        "name": "switchlora",
        "rank": 4,
        "candidates": "device",
        "interval": 2,
        "freeze_steps": 1,
        "descent_rate": 1000.0,
    },
    "sltrain": {"name": "sltrain", "rank": 4, "sparsity": 0.1},
}


def session_of(settings: dict[str, Any]) -> tuple[Session[Any], int]:
    """A session on a bf16 model with fp32-exact weights after four updates; its projections."""
    config = TypeAdapter(MethodConfig).validate_python(settings)
    method = METHODS[config.name](config, 42, 10)
    model = meta_model(ARCHITECTURE, method, TRAIN)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = VectorAdamW(trained)
    for p in trained:
        optimizer.state[p] = {key: torch.zeros_like(p, dtype=torch.float32) for key in MOMENTS}
    with SimulatedDevice(reading=0.0):  # nothing differs from what is expected
        layout = WholeParameters([trained], optimizer, None)
        bases = {
            weight: KINDS["bf16_residual"](
                weight.data.view(-1), torch.zeros(weight.numel(), device=DEVICE)
            )
            for weight in method.edited_weights(model)
        }
        clocks = {p: VectorClock(p.shape[a], a) for p, a in method.vector_axes(model).items()}
        state = ZeroState(layout, bases, clocks, lambda: 4, lambda: None)
        session = method.start(state, model)
    return session, len(projection_layers(model))


@torch.no_grad()
def costs_of(act: Callable[[], Any]) -> Costs:
    device = SimulatedDevice()
    with device:
        act()
    return device.costs


EVENTS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "relora, zero": ((1840, 9, 0), (0, 0, 0)),
    "relora, random": ((2640, 9, 0), (0, 0, 0)),
    "relora, magnitude": ((2400, 209, 0), (0, 0, 0)),
    "switchlora": ((2520, 7, 84), (690, 0, 66)),
    "sltrain": ((0, 0, 0), (0, 0, 0)),
}
"""Launches, waits and queued copies of all hooks around one update of a model with seven
projections, at most: where an event is due and measured, and one update later.

Every merge is measured, and a switch where a line of the log has to say something: a wait for each
projection."""


@pytest.mark.parametrize("name", SETTINGS)
def test_hooks_never_copy_from_pageable_memory(name: str) -> None:
    with torch.no_grad():
        session, projections = session_of(SETTINGS[name])
    assert projections == 7
    for step, limits in zip((4, 5), EVENTS[name], strict=True):

        def around_the_update(step: int = step) -> None:
            session.before_step(step)
            session.after_step(step)

        costs = costs_of(around_the_update)
        found = len(costs.launches), len(costs.waits), len(costs.queued)
        assert not costs.blocking
        assert all(count <= limit for count, limit in zip(found, limits, strict=True)), found
