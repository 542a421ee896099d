"""Launches, waits and blocking copies that optimizers and events ask of a device: upper limits.

What was counted, and a little room. What lowers a count should lower its limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from relora_ds.config.methods.catalogue import MethodConfig
from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.engine.zero.digest import ReplicaDigest
from relora_ds.engine.zero.layout import Layout
from relora_ds.engine.zero.moments import OptimizerSlices
from relora_ds.engine.zero.state import ZeroState
from relora_ds.engine.zero.tensor_gradients import FrozenGradients
from relora_ds.methods.build import meta_model
from relora_ds.methods.galore.layer import GaLoreLinear
from relora_ds.methods.interface import Session
from relora_ds.methods.registry import METHODS
from relora_ds.methods.switchlora.switchlora import SwitchLoRASession
from relora_ds.numerics.base_weight import KINDS
from relora_ds.numerics.batched import rows
from relora_ds.numerics.gpu import launch
from relora_ds.optim.block_adamw import BlockAdamW
from relora_ds.optim.grouped import GroupedOptimizer, PlacedMatrix
from relora_ds.optim.matrix import MatrixOptimizer, MatrixSlice, OfWhole, Unit
from relora_ds.optim.matrix_wise.muon import Muon
from relora_ds.optim.matrix_wise.scale import Scale
from relora_ds.optim.rectangles import Rectangle
from relora_ds.optim.vector_adamw import VectorAdamW, storage_key
from relora_ds.optim.vector_clock import Fragment, VectorClock
from relora_ds.parallel.tensor import SINGLE
from relora_ds.randomness import Stream
from tests.harness.device_costs import DEVICE, Costs, MixedDevicesError, SimulatedDevice, pin
from tests.harness.kernels import REASON
from tests.harness.simulated_zero import layout_of, rank_of_two

ROWS, COLS = 12, 16


def test_the_device_counts_and_refuses() -> None:
    device = SimulatedDevice(3.0)
    with device:
        here, there = torch.zeros(2, device=DEVICE), torch.zeros(2)
        assert (here + here).sum().item() == 3.0
        assert here.cpu().tolist() == [3.0, 3.0]
        there.to(DEVICE)
        here[torch.tensor([0])] = 1.0
        for host in (there, there.pin_memory()):
            host.to(DEVICE, non_blocking=True)
            here.copy_(host, non_blocking=True)
            host.copy_(here, non_blocking=True)
        here.mul_(torch.tensor(2.0))  # a number, which a launch takes along
        with pytest.raises(MixedDevicesError):
            torch.add(here, there)
    assert device.costs == Costs(
        launches=["zeros", "add", "sum", "scalar_tensor", "index_put_", "mul_"],
        waits=["_local_scalar_dense", "_to_copy", "copy_"],
        blocking=["upload", "index_put_", "upload", "upload"],
        queued=["upload", "upload", "copy_"],
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
        self, units: Sequence[Unit], requests: Sequence[OfWhole]
    ) -> list[tuple[torch.Tensor, ...]]:
        found = []
        for unit, request in zip(units, requests, strict=True):
            pairs = zip(unit, request.values, strict=True)
            wholes = [value.view(1, *matrix.shape) for matrix, each in pairs for value in each]
            found.append(tuple(each.reshape(-1) for each in request.function(*wholes)))
        return found


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
    "relora, trained scaling": {
        "name": "relora",
        "rank": 4,
        "merge_every": 4,
        "init": "balanced",
        "trainable_scaling": True,
    },
    "sltrain": {"name": "sltrain", "rank": 4, "sparsity": 0.1},
}


class PassedGradients(FrozenGradients):
    """Dense gradients of a micro-batch whose passes are made elsewhere: at stage 3 they need what
    DeepSpeed gathers."""

    def passes(self) -> Iterator[int]:
        yield 0
        for module in self._model.modules():
            if isinstance(module, GaLoreLinear):
                assert module.sink is not None
                shape = module.spec.out_features, module.spec.in_features
                module.sink(torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE))


@dataclass
class Live:
    """A run of a bf16 model with exact frozen weights, after four updates."""

    model: nn.Module
    layout: Layout
    state: ZeroState
    session: Session[Any]
    digest: ReplicaDigest


def live(
    settings: dict[str, Any], stage: int, layers: int, architecture: ModelConfig = ARCHITECTURE
) -> Live:
    config = TypeAdapter(MethodConfig).validate_python(settings)
    method = METHODS[config.name](config, 42, 10)
    architecture = architecture.model_copy(update={"num_hidden_layers": layers})
    model = meta_model(architecture, method, TRAIN)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    clocks = {p: VectorClock(p.shape[a], a) for p, a in method.vector_axes(model).items()}
    edited = method.edited_weights(model)
    with SimulatedDevice(reading=0.0), rank_of_two():  # nothing differs from what is expected
        layout = layout_of(model, stage)
        bases = {}
        for weight in edited:
            _, working = layout.working(weight)
            exact = torch.zeros(working.numel(), device=DEVICE)
            bases[weight] = KINDS["bf16_residual"](working, exact)
        probe, pair = torch.ones(3, device=DEVICE), cast("Any", "pair")
        passed = PassedGradients(model, DEVICE, pair, SINGLE)
        slices = OptimizerSlices(layout, clocks, lambda: 4)
        state = ZeroState(slices, bases, lambda: probe, passed)
        state.host.tensor = _pinned(state.host.tensor)
        session = method.start(state, model)
        names = dict(model.named_parameters())
        matrices: Any = SimpleNamespace(shared=lambda: (), replicated=lambda: ())
        digest = ReplicaDigest(names, layout, bases, clocks, matrices, pair)
    return Live(model, layout, state, session, digest)


def _pinned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """As host memory is beside a GPU."""
    return lambda shape, dtype: pin(allocate(shape, dtype))


@torch.no_grad()
def costs_of(act: Callable[[], Any]) -> Costs:
    device = SimulatedDevice()
    with device:
        act()
    return device.costs


STAGES = (0, 1, 3)
"""1 and 2 keep state alike."""
PROJECTIONS = 7
"""Of a layer."""


@dataclass(frozen=True)
class Limits:
    """What an event may cost at most, in a model with any number of projections."""

    launches: int
    """For each projection."""
    waits: int
    queued: int
    """Copies between host and device that nobody waits for."""


EVENTS: dict[str, tuple[Limits, Limits]] = {
    "relora, zero": (Limits(135, 1, 0), Limits(0, 0, 0)),
    "relora, random": (Limits(250, 1, 0), Limits(0, 0, 0)),
    "relora, magnitude": (Limits(330, 1, 1), Limits(0, 0, 0)),
    "relora, trained scaling": (Limits(185, 1, 0), Limits(0, 0, 0)),
    "switchlora": (Limits(240, 1, 2), Limits(106, 0, 1)),
    "sltrain": (Limits(0, 0, 0), Limits(0, 0, 0)),
}
"""All hooks around one update: where an event is due and measured, and one update later. The first
switch of a process also draws the signs by which ranks are estimated.

Every merge is measured, and a switch where a line of the log has to say something. What the host
learns of it is one read, and what it drew for it one copy; the first switch brings the numbers of
the next one too, which later ones find there."""


def around_the_update(run: Live, step: int) -> None:
    run.session.before_step(step)
    run.session.after_step(step)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("stage", STAGES)
def test_an_event_waits_once_however_many_projections_there_are(name: str, stage: int) -> None:
    found = []
    with torch.no_grad(), rank_of_two():  # the first event of a process fills its caches
        costs_of(partial(around_the_update, live(SETTINGS[name], stage, 1), 4))
    for layers in (1, 3):
        with torch.no_grad(), rank_of_two():
            run = live(SETTINGS[name], stage, layers)
            for step, limits in zip((4, 5), EVENTS[name], strict=True):
                costs = costs_of(partial(around_the_update, run, step))
                launches = len(costs.launches) / (layers * PROJECTIONS)
                assert launches <= limits.launches
                assert len(costs.waits) <= limits.waits, costs.waits
                assert len(costs.queued) <= limits.queued, costs.queued
                assert not costs.blocking
                found.append((len(costs.waits), len(costs.queued)))
    assert found[:2] == found[2:]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_comparison_of_replicas_waits_once(name: str, stage: int) -> None:
    for layers in (1, 3):
        with torch.no_grad(), rank_of_two():
            run = live(SETTINGS[name], stage, layers)
            device = SimulatedDevice(reading=0.0)
            with device:
                run.digest.check(run.session.replicas(), "merge")
        assert len(device.costs.waits) == 1, device.costs.waits
        assert not device.costs.blocking
        assert len(device.costs.queued) == 1, device.costs.queued


def test_candidates_of_the_host_are_copied_and_not_waited_for() -> None:
    settings = SETTINGS["switchlora"] | {"candidates": "host"}
    with torch.no_grad(), rank_of_two():
        run = live(settings, 0, 1)
        for step in (4, 5):
            costs = costs_of(partial(around_the_update, run, step))
            assert len(costs.waits) <= 1
            assert not costs.blocking


LARGE = ModelConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5461,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=64,
    max_position_embeddings=2048,
)
"""configs/model/llama_1b.json"""
SWITCHED = {"name": "switchlora", "rank": 512, "interval": 40, "descent_rate": 1e6}
"""configs/run/llama_1b_switchlora.yaml, as at its start"""
KERNELS, COPIES = 60, 2


@pytest.mark.parametrize(
    ("stage", "candidates", "layers"),
    [(1, "host", 2), (3, "device", 2), pytest.param(1, "host", 24, marks=pytest.mark.slow)],
)
def test_a_switch_of_a_large_model_is_a_few_launches_of_kernels(
    stage: int, candidates: str, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason=REASON)
    started: list[object] = []

    def start(kernel: object, *rest: object, **options: object) -> None:
        started.append(kernel)

    with torch.no_grad(), rank_of_two():
        run = live(SWITCHED | {"candidates": candidates}, stage, layers, LARGE)
        monkeypatch.setattr(launch, "usable", lambda device: device == DEVICE)
        monkeypatch.setattr(launch, "start", start)
        # as it is where there is a GPU to pin memory for
        monkeypatch.setattr(rows, "_within_reach", lambda tensor, device: True)
        costs_of(partial(around_the_update, run, 4))  # measured, for the first line of the log
        started.clear()
        costs = costs_of(partial(around_the_update, run, 5))
    assert 0 < len(started) + len(costs.launches) <= KERNELS, (started, costs.launches)
    assert len(costs.waits) + len(costs.blocking) <= COPIES, (costs.waits, costs.blocking)
    assert len(costs.queued) <= KERNELS
    assert isinstance(run.session, SwitchLoRASession)
    switched = run.session.layers.values()
    assert sum(sum(each.state.cursors) for each in switched) >= 2 * len(switched) * 2 * 12


@pytest.mark.parametrize("stage", STAGES)
def test_a_refresh_waits_once_beside_the_decompositions(stage: int) -> None:
    settings = {"name": "galore", "rank": 4, "update_every": 4}
    for layers in (1, 3):
        with torch.no_grad(), rank_of_two():
            run = live(settings, stage, layers)
            refresh = costs_of(partial(around_the_update, run, 4))
            update = costs_of(partial(around_the_update, run, 5))
        own = -(-layers * PROJECTIONS // 2)  # two processes take turns
        assert refresh.waits.count("_linalg_eigh") == own
        assert len(refresh.waits) == own + 1, refresh.waits
        assert len(refresh.launches) / (layers * PROJECTIONS) <= 105
        assert not refresh.blocking
        assert not refresh.queued
        assert update == Costs()
