"""The double that tests of methods use and the state of a real run keep to one contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from relora_ds.methods.adapter import AdapterLinear
from relora_ds.methods.registry import plan_phases
from relora_ds.numerics.base_weight import Precision
from relora_ds.optim.vector_clock import VectorClock
from relora_ds.parallel.linear import LinearSpec
from tests.contract import zero_ports
from tests.contract.ports import CHECKS, Subject
from tests.harness.kernels import REASON
from tests.harness.ranks import run_ranks
from tests.harness.runs import switchlora
from tests.unit.methods.memory_state import memory_state


def in_memory(precision: Precision) -> Subject:
    """The double over one layer, after one update."""
    method = plan_phases(switchlora("fp32"))[-1].method
    layer = method.linear(LinearSpec("q_proj", 24, 40, bias=False, style="column"))
    assert isinstance(layer, AdapterLinear)
    generator = torch.Generator().manual_seed(0)
    method.initialize(layer, 0.1 * torch.randn(40, 24, generator=generator))
    model = nn.Sequential(layer)
    state = memory_state(model, precision)
    for parameter, axis in method.vector_axes(model).items():
        state.clocks[parameter] = VectorClock(parameter.shape[axis], axis)
    state.completed = 1
    parameters = layer.weight, layer.lora_A, layer.lora_B
    shapes = layer.weight.shape, layer.lora_A.shape, layer.lora_B.shape
    return Subject(state, *parameters, lambda value: value, shapes)


@pytest.mark.parametrize("precision", ["working", "bf16_residual"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@torch.no_grad()
def test_the_double(check: Callable[[Subject], None], precision: Precision) -> None:
    check(in_memory(precision))


@pytest.mark.distributed
@pytest.mark.parametrize("layout", zero_ports.LAYOUTS)
def test_the_state_of_a_run(layout: str) -> None:
    run_ranks(zero_ports.check, 2, layout=layout)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["stage 1, bf16", "stage 3, nothing persists"])
def test_kernels_keep_to_it_too(layout: str) -> None:
    pytest.importorskip("triton", reason=REASON)
    run_ranks(zero_ports.check_kernels, 2, layout=layout)
