"""Tensors of a checkpoint that are missing or damaged are a CheckpointError that says which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from relora_ds.checkpoint.export import DenseModel
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.reshape import reshape_checkpoint
from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.errors import CheckpointError
from relora_ds.parallel.tensor import SINGLE, TensorParallel
from tests.unit.checkpoint.conftest import Saved

SIDE, METHOD = layout.side(""), layout.method("")
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut in the header": lambda content: content[:20],
    "cut in the values": lambda content: content[:-8],
    "not its format": lambda content: b"x" * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_side_file(saved: Saved, damage: str) -> None:
    saved.write(SIDE, DAMAGE[damage]((saved.path / SIDE).read_bytes()))
    with pytest.raises(CheckpointError, match=f"{SIDE}: cannot be read"):
        dict(DenseModel(saved.path).weights())


def test_missing_side_file(saved: Saved) -> None:
    saved.remove(SIDE)
    with pytest.raises(CheckpointError, match=f"{SIDE}: missing from {layout.MANIFEST}"):
        DenseModel(saved.path)


def test_missing_exact_value(saved: Saved) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        del tensors[next(name for name in tensors if name.startswith("base."))]

    saved.edit(SIDE, drop)
    with pytest.raises(CheckpointError, match=r"holds 0 elements of the .* of .*; use another one"):
        dict(SavedRun(saved.path).state().tensors())


@pytest.mark.parametrize(
    ("method", "held"),
    [
        ({"name": "relora", "rank": 4}, r"as \(2, 16\)"),
        ({"name": "sltrain", "rank": 2}, "not at all"),
    ],
)
def test_weights_of_another_run(saved: Saved, method: dict[str, Any], held: str) -> None:
    saved.edit(layout.RUN, lambda data: data.update(method=method))
    saved.edit(layout.TRAINER, lambda data: data.update(phase=method["name"]))
    with pytest.raises(CheckpointError, match=rf"holds model\.layers\.0\..* {held}, but its run"):
        SavedRun(saved.path).state()


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_method_file(saved_switchlora: Saved, damage: str) -> None:
    content = (saved_switchlora.path / METHOD).read_bytes()
    saved_switchlora.write(METHOD, DAMAGE[damage](content))
    with pytest.raises(CheckpointError, match=f"{METHOD}: cannot be read"):
        SavedRun(saved_switchlora.path).own_method_state(SINGLE)


def test_method_files_that_make_no_whole(saved_switchlora: Saved) -> None:
    path = saved_switchlora.path
    content = (path / METHOD).read_bytes()
    for rank in range(2):  # each holds everything instead of its part
        (path / layout.method(f"_tp_{rank}")).write_bytes(content)
    saved_switchlora.edit(layout.TRAINER, lambda data: data.update(tensor_size=2))
    run = SavedRun(path)
    assert run.own_method_state(TensorParallel(0, 2)).keys() >= {"cursors", "pairs"}
    with pytest.raises(CheckpointError, match="method's state cannot be those of this run"):
        run.own_method_state(SINGLE)
    saved_switchlora.remove(layout.method("_tp_1"))
    with pytest.raises(CheckpointError, match="method's state cannot be those of this run"):
        run.own_method_state(SINGLE)


def test_damaged_rewritten_state(saved: Saved) -> None:
    target = saved.path.with_name("rewritten")
    reshape_checkpoint(saved.path, target)
    rewritten = Saved(target)
    rewritten.edit(layout.state(0), lambda tensors: tensors.pop("master.model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"holds 0 of 16 elements of model\.norm\.weight"):
        SavedRun(target).state()
    rewritten.write(layout.state(0), b"")
    with pytest.raises(CheckpointError, match=f"{layout.state(0)}: cannot be read"):
        SavedRun(target).state()
