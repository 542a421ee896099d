"""Tensors of a checkpoint that are missing or damaged are a CheckpointError that says which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.rewriting.reshape import reshape_checkpoint
from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.engine.deepspeed.files import read_shard
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


def optimizer_of(saved: Saved, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what the shard of the optimizer holds."""
    path = next(saved.path.glob("*_optim_states.pt"))
    content = read_shard(path)
    change(content["optimizer_state_dict"])
    torch.save(content, path)


def states(shard: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    return list(shard["base_optimizer_state"]["state"].values())


def all_after(step: int) -> Callable[[dict[str, Any]], Any]:
    return lambda shard: [state.update(step=torch.tensor(float(step))) for state in states(shard)]


def shortened(shard: dict[str, Any]) -> None:
    for state in states(shard):
        state["exp_avg"] = state["exp_avg"][:1]


SHARDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "earlier": (all_after(3), r"applied 3 updates of the phase relora, but trainer\.json says 5"),
    "later": (all_after(6), "applied 6 updates"),
    "of two steps": (lambda shard: states(shard)[1].update(step=torch.tensor(4.0)), "5 and 4"),
    "without steps": (lambda shard: [state.pop("step") for state in states(shard)], "applied 0"),
    "no tensors": (
        lambda shard: shard.update(single_partition_of_fp32_groups=[1, 2, 3]),
        "its weights and optimizer states cannot be those of this run",
    ),
    "no groups": (lambda shard: shard.clear(), "cannot be those of this run"),
    "shorter moments": (shortened, "elements of the exp_avg of"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_optimizer_states_of_another_step_or_shape(saved: Saved, case: str) -> None:
    change, words = SHARDS[case]
    optimizer_of(saved, change)
    with pytest.raises(CheckpointError, match=words):
        dict(SavedRun(saved.path).state().tensors())


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_left_out_updates_are_not_missing(saved: Saved, action: str) -> None:
    """A run that skipped a batch has steps which its optimizer never saw, whatever its guards are
    set to by the time that the checkpoint is written."""
    saved.edit(layout.RUN, lambda data: data.update(guards={"non_finite": action}))
    saved.edit(layout.TRAINER, lambda data: data.update(guards={"skipped_steps": 2}))
    optimizer_of(saved, all_after(3))
    assert SavedRun(saved.path).state().completed == 3
    for applied in (2, 6):
        optimizer_of(saved, all_after(applied))
        with pytest.raises(CheckpointError, match=f"applied {applied} updates.* were mixed"):
            SavedRun(saved.path).state()


def test_a_rewritten_state_without_its_count_of_updates(saved: Saved) -> None:
    target = saved.path.with_name("rewritten")
    reshape_checkpoint(saved.path, target)
    Saved(target).edit(layout.state(0), lambda tensors: tensors.pop("completed_steps"))
    with pytest.raises(CheckpointError, match=f"{layout.state(0)}: holds no completed_steps"):
        SavedRun(target).state()
