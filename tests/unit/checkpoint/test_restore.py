"""A restored state fits the engine that takes it, or is refused in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from relora_ds.checkpoint.restore import (
    check_moments,
    load_side_tensors,
    load_state,
    side_slices,
    side_tensors,
)
from relora_ds.checkpoint.saved_state import SavedState
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import CheckpointError
from relora_ds.optim.block_adamw import BlockAdamW
from relora_ds.optim.grouped import GroupedOptimizer
from relora_ds.optim.vector_adamw import VectorAdamW


class Tensors(SimpleNamespace):
    """A clock, an edited base or the matrices of an engine: named tensors, and what was called."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__(named=tensors, calls=0)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.named

    def refresh(self) -> None:
        self.calls += 1


class Engine(SimpleNamespace):
    """One trained parameter with a clock, one edited weight, and a matrix state of each kind."""

    def __init__(self, *, sharded: bool = False) -> None:
        trained, weight = torch.zeros(2), torch.zeros(3)
        self.clock = Tensors(born=torch.zeros(2, dtype=torch.int32))
        self.base = Tensors(residual=torch.zeros(3, dtype=torch.int16))
        same, own = {"matrix.basis": torch.zeros(4)}, {"matrix.slice": torch.zeros(5)}
        super().__init__(
            clocks={trained: self.clock},
            bases={weight: self.base},
            matrices=SimpleNamespace(side_tensors=lambda: same, side_slices=lambda: own),
            layout=SimpleNamespace(weights_sharded=sharded),
            sealed=0,
        )
        self.known = {trained: "a.lora_A", weight: "a.weight"}

    def names(self) -> dict[torch.Tensor, str]:
        return self.known

    def seal_frozen(self) -> None:
        self.sealed += 1

    @property
    def engine(self) -> TrainEngine:
        return cast(TrainEngine, self)


SAVED = {
    "clock.a.lora_A.born": torch.tensor([3, 4], dtype=torch.int32),
    "base.a.weight.residual": torch.tensor([-1, 0, 1], dtype=torch.int16),
    "matrix.basis": torch.arange(4.0),
    "matrix.slice": torch.arange(5.0),
}


@pytest.mark.parametrize("sharded", [False, True])
def test_what_differs_by_rank_lies_apart(sharded: bool) -> None:
    engine = Engine(sharded=sharded).engine
    common, own = side_tensors(engine), side_slices(engine)
    assert not common.keys() & own.keys()
    assert common.keys() | own.keys() == SAVED.keys()
    assert ("base.a.weight.residual" in own) == sharded
    assert "clock.a.lora_A.born" in common


def test_side_tensors_are_restored_in_place() -> None:
    engine = Engine()
    live = side_tensors(engine.engine) | side_slices(engine.engine)
    load_side_tensors(engine.engine, SAVED)
    for name, tensor in live.items():
        assert torch.equal(tensor, SAVED[name]), name
    assert engine.clock.calls == 1  # what it derives from its tensors is derived anew
    assert engine.sealed == 1


@pytest.mark.parametrize("name", [*SAVED, "clock.b.lora_A.born"])
def test_names_of_another_run_change_nothing(name: str) -> None:
    engine, other = Engine(), dict(SAVED)
    if other.pop(name, None) is None:
        other[name] = torch.zeros(2)
    with pytest.raises(CheckpointError, match=f"differs from the run's, first at '{name}'"):
        load_side_tensors(engine.engine, other)
    live = side_tensors(engine.engine) | side_slices(engine.engine)
    assert not any(tensor.any() for tensor in live.values())
    assert engine.sealed == 0


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("clock.a.lora_A.born", torch.ones(2)),
        ("matrix.basis", torch.ones(1)),
        ("base.a.weight.residual", torch.ones(3, 1, dtype=torch.int16)),
    ],
)
def test_what_torch_would_stretch_or_convert_changes_nothing(
    name: str, other: torch.Tensor
) -> None:
    engine = Engine()
    with pytest.raises(CheckpointError, match=rf"{name} is torch\..* of shape .*, but the run has"):
        load_side_tensors(engine.engine, SAVED | {name: other})
    live = side_tensors(engine.engine) | side_slices(engine.engine)
    assert not any(tensor.any() for tensor in live.values())


Kind = type[VectorAdamW | torch.optim.AdamW]


def _with_moments(state: dict[str, torch.Tensor], kind: Kind = VectorAdamW) -> TrainEngine:
    owners = [torch.zeros(6), torch.zeros(2)]  # one has no state yet
    optimizer = kind(owners)
    optimizer.state[owners[0]] = state
    layout = SimpleNamespace(owners=lambda: owners)
    return cast(TrainEngine, SimpleNamespace(optimizer=optimizer, layout=layout))


CODES = {
    "exp_avg": torch.zeros(6, dtype=torch.int8),
    "exp_avg_sq": torch.zeros(6, dtype=torch.uint8),
    "exp_avg_scale": torch.zeros(1),
    "exp_avg_sq_scale": torch.zeros(1),
}
WIDE = {"exp_avg": torch.zeros(6), "exp_avg_sq": torch.zeros(6)}
STATES: dict[Kind, dict[str, torch.Tensor]] = {
    VectorAdamW: WIDE,
    GroupedOptimizer: WIDE,
    torch.optim.AdamW: WIDE,
    BlockAdamW: CODES,
}


@pytest.mark.parametrize("kind", STATES)
def test_moments_of_another_optimizer(kind: Kind) -> None:
    for state in (WIDE, CODES):
        engine = _with_moments({"step": torch.tensor(3.0), **state}, kind)
        if state is STATES[kind]:
            check_moments(engine)
            continue
        with pytest.raises(CheckpointError, match=r"different ones; restore optimizer\.name"):
            check_moments(engine)


def test_moments_of_the_right_size() -> None:
    step = torch.tensor(3.0)
    check_moments(_with_moments({**WIDE, "step": step, "exp_avg_sq": torch.zeros(2, 3)}))


@pytest.mark.parametrize("size", [0, 1, 5, 7])
def test_moments_that_torch_would_stretch(size: int) -> None:
    engine = _with_moments(WIDE | {"exp_avg_sq": torch.zeros(size)})
    with pytest.raises(CheckpointError, match=rf"{size} of 6 elements of a tensor's exp_avg_sq"):
        check_moments(engine)


def test_optimizers_whose_moments_have_another_form() -> None:
    engine = SimpleNamespace(optimizer=torch.optim.SGD([torch.zeros(1)]))
    with pytest.raises(CheckpointError, match="resume with the processes and stage"):
        load_state(cast(TrainEngine, engine), cast(SavedState, None))
