"""A session's saved state on tensor-parallel ranks: the whole from the parts, a part of a whole.

Every sharded tensor of it names the parameter that it is sharded like (`SavedTensor`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from relora_ds.methods.interface import SavedTensor
from relora_ds.parallel.shape import TPShard

Likeness = Mapping[str, tuple[str, int]]
"""Key of a sharded tensor -> the parameter that it is sharded like, and its own dimension."""


def unwrap(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[str, int]]]:
    """Plain values of a session's state, and how the tensors among them are sharded."""
    plain, like = {}, {}
    for key, value in state.items():
        plain[key] = value.value if isinstance(value, SavedTensor) else value
        if isinstance(value, SavedTensor) and value.like is not None:
            like[key] = value.like, value.dim
    return plain, like


def join_parts(
    states: Sequence[Mapping[str, Any]], shards: Sequence[Mapping[str, TPShard]], like: Likeness
) -> dict[str, Any]:
    """The state for the whole model.

    Args:
        states: of the tensor-parallel ranks, with plain tensors.
        shards: which part of every sharded parameter each rank holds.
        like: how tensors are sharded.
    """
    joined = dict(states[0])
    for key, (name, dim) in like.items():
        first = _shard(shards[0], name)
        if first is None:
            continue
        shape = list(joined[key].shape)
        shape[dim] = first.global_shape[first.dim]
        joined[key] = joined[key].new_empty(shape)
        for state, held in zip(states, shards, strict=True):
            replace(held[name], dim=dim).place(state[key], joined[key])
    return joined


def part_of(
    state: Mapping[str, Any], shards: Mapping[str, TPShard], like: Likeness
) -> dict[str, Any]:
    """A rank's part of the state for the whole model: the inverse of `join_parts`."""
    own = dict(state)
    for key, (name, dim) in like.items():
        shard = _shard(shards, name)
        if shard is not None:
            own[key] = replace(shard, dim=dim).part(own[key])
    return own


def _shard(shards: Mapping[str, TPShard], name: str) -> TPShard | None:
    """None also for a factor that is sharded along r: methods see, and save, all of it."""
    shard = shards.get(name)
    return None if shard is None or shard.inner else shard


def likeness_by_name(keys: Iterable[str]) -> Likeness:
    """How tensors are sharded, from their names alone: format 0 of a checkpoint does not say.

    Only SwitchLoRA's are. Parked vectors are rows, sharded like the vectors of their factor; the
    reference of the update's rank has the rows of its weight.
    """
    like: dict[str, tuple[str, int]] = {}
    for key in keys:
        layer, _, what = key.partition("_proj.")
        if what == "update_rank":
            like[key] = f"{layer}_proj.weight", 0
        elif ".vectors." in what:
            like[key] = f"{layer}_proj.lora_{what[0]}", 1
    return like
