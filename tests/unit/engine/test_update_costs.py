"""What an update and an evaluation ask of a device: neither waits for its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from relora_ds.config.schema import RunConfig
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.engine import TrainEngine
from relora_ds.engine.zero.tensor_gradients import FrozenGradients
from relora_ds.methods.build import meta_model
from relora_ds.methods.interface import Method
from relora_ds.methods.registry import plan_phases
from relora_ds.model.llama import Llama
from relora_ds.optim.matrix_wise.spectral import SpectralPair
from relora_ds.parallel.tensor import SINGLE
from relora_ds.train.evaluate import validation_loss
from tests.harness.build import TINY, run_config
from tests.harness.device_costs import DEVICE, Costs, SimulatedDevice
from tests.harness.simulated_zero import rank_of_two

MICRO_BATCHES = 3


class _Tokens:
    """Micro-batches as data comes: in pageable memory."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(MICRO_BATCHES):
            yield torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, dtype=torch.bool)


def _run(method: dict[str, Any]) -> tuple[RunConfig, Method[Any], Llama]:
    """A run that updates within the backward pass, and its model on the device."""
    train = {"precision": "bf16", "per_layer_update": True, "gradient_reduction": "micro_batch"}
    config = run_config(method, train=train | {"global_batch_size": 2 * MICRO_BATCHES})
    kind = plan_phases(config)[-1].method
    return config, kind, meta_model(TINY, kind, config.train)


def _engine(method: dict[str, Any]) -> TrainEngine:
    config, kind, model = _run(method)
    zero = resolve_deepspeed_config({"zero_optimization": {"stage": 0}}, config, 1)
    return TrainEngine(model, kind, config, zero, lambda: None)


@pytest.mark.parametrize("name", ["full", "galore", "relora", "sltrain", "switchlora"])
def test_an_update_takes_its_tokens_along_without_waiting(name: str) -> None:
    costs, world = Costs(), SimpleNamespace(WORLD="alone")
    with rank_of_two(), patch.object(torch.distributed, "group", world):
        with SimulatedDevice(reading=0.0):  # nothing differs from what is expected
            engine = _engine({"name": name} | ({} if name == "full" else {"rank": 4}))
        for _ in range(2):  # the first makes what is kept
            with SimulatedDevice() as device:
                engine.train_step(tokens for tokens, _ in _Tokens())
            costs = device.costs
    assert costs.launches
    assert not costs.waits
    assert not costs.blocking
    assert len(costs.queued) == MICRO_BATCHES


def test_the_passes_of_a_refresh_wait_for_nothing() -> None:
    _, _, model = _run({"name": "galore", "rank": 4})
    gradients, costs = FrozenGradients(model, DEVICE, None, SINGLE), Costs()
    gradients.batch = lambda: [tokens for tokens, _ in _Tokens()]
    for _ in range(2):
        with SimulatedDevice() as device:
            assert list(gradients.passes()) == [*reversed(range(MICRO_BATCHES))]
        costs = device.costs
    assert not costs.waits
    assert not costs.blocking
    assert len(costs.queued) == MICRO_BATCHES


def test_an_evaluation_waits_once() -> None:
    _, _, model = _run({"name": "full"})
    batches: Any = _Tokens()
    costs = Costs()
    for _ in range(2):
        with SimulatedDevice() as device:
            validation_loss(model, batches, DEVICE, distributed=False)
        costs = device.costs
    assert len(costs.waits) == 1
    assert not costs.blocking
    assert len(costs.queued) == 2 * MICRO_BATCHES


@pytest.mark.parametrize("normalized", [False, True])
def test_spectral_updates_wait_for_nothing(normalized: bool) -> None:
    rule, costs = SpectralPair(normalized=normalized), Costs()
    factors = [torch.empty(3, *shape, device=DEVICE) for shape in [(4, 9)] * 2 + [(12, 4)] * 2]
    for _ in range(2):  # the first makes what is kept
        with SimulatedDevice() as device:
            rule.directions(*factors)
        costs = device.costs
    assert costs.launches
    assert not costs.waits
    assert not costs.blocking
