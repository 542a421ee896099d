"""A session's state: what is taken out of it, cut for ranks and put together again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from relora_ds.checkpoint.method_state import join_parts, likeness_by_name, part_of, unwrap
from relora_ds.methods.interface import SavedTensor
from relora_ds.parallel.shape import TPShard

WEIGHT = torch.Size((6, 4))
UNEVEN = (torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5]))
"""Rows of two ranks that are no ranges."""


def shards(*indices: range | torch.Tensor, inner: bool = False) -> list[dict[str, TPShard]]:
    return [{"q.weight": TPShard(WEIGHT, 0, index, inner)} for index in indices]


def test_values_are_unwrapped_and_only_the_sharded_are_listed() -> None:
    rows, pairs = torch.arange(6), torch.arange(3)
    plain, like = unwrap(
        {"rows": SavedTensor(rows, "q.weight", 1), "pairs": SavedTensor(pairs), "events": 3}
    )
    assert plain["rows"] is rows
    assert plain["pairs"] is pairs
    assert plain["events"] == 3
    assert like == {"rows": ("q.weight", 1)}


@pytest.mark.parametrize("indices", [(range(4), range(4, 6)), UNEVEN], ids=["ranges", "positions"])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_joined_are_the_whole(indices: tuple[Any, ...], dim: int) -> None:
    shape = [2, 2]
    shape[dim] = WEIGHT[0]  # sharded as the weight's rows are, along a dimension of its own
    whole = {"parked": torch.randn(shape), "pairs": torch.arange(3), "events": 3}
    held, like = shards(*indices), {"parked": ("q.weight", dim)}
    parts = [part_of(whole, of_rank, like) for of_rank in held]
    assert [part["parked"].shape[dim] for part in parts] == [len(index) for index in indices]
    joined = join_parts(parts, held, like)
    assert torch.equal(joined["parked"], whole["parked"])
    assert joined["pairs"] is whole["pairs"]
    assert joined["events"] == 3


@pytest.mark.parametrize("held", [[{}, {}], shards(range(3), range(3, 6), inner=True)])
def test_what_every_rank_sees_whole_is_taken_from_the_first(held: list[dict[str, TPShard]]) -> None:
    like = {"parked": ("q.weight", 0)}
    whole = {"parked": torch.randn(6, 2)}
    parts = [part_of(whole, of_rank, like) for of_rank in held]
    assert all(part["parked"] is whole["parked"] for part in parts)
    assert torch.equal(join_parts(parts, held, like)["parked"], whole["parked"])


def test_a_part_leaves_the_whole_alone() -> None:
    whole = {"parked": torch.randn(6, 2)}
    part_of(whole, shards(range(3))[0], {"parked": ("q.weight", 0)})
    assert whole["parked"].shape == (6, 2)


def test_likeness_of_the_first_format() -> None:
    layer = "model.layers.0.self_attn.q"
    keys = [f"{layer}_proj.update_rank", f"{layer}_proj.A.vectors.1", f"{layer}_proj.B.vectors.0"]
    assert likeness_by_name([*keys, f"{layer}_proj.order", "events"]) == {
        keys[0]: (f"{layer}_proj.weight", 0),
        keys[1]: (f"{layer}_proj.lora_A", 1),
        keys[2]: (f"{layer}_proj.lora_B", 1),
    }
