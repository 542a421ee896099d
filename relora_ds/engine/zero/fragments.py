"""What the optimizer has to know of the tensors it steps: vectors with a clock, and draws."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from relora_ds.engine.zero.layout import Layout
from relora_ds.optim.vector_adamw import storage_key
from relora_ds.optim.vector_clock import Fragment, Stretch, VectorClock
from relora_ds.parallel.shape import inner_shard, tp_local_shape
from relora_ds.randomness import Stream


def clocked_fragments(
    layout: Layout, clocks: Mapping[nn.Parameter, VectorClock]
) -> dict[int, list[Fragment]]:
    """Clocked fragments of every tensor that the optimizer steps, in order of offset."""
    fragments: dict[int, list[Fragment]] = {storage_key(owner): [] for owner in layout.owners()}
    for parameter, clock in clocks.items():
        owner, stretch = layout.placements[parameter].owner, layout.placements[parameter].stretch
        if stretch.length:
            fragment = fragment_of(parameter, stretch, clock)
            fragments[storage_key(owner)].append(fragment)
    for known in fragments.values():
        known.sort(key=lambda fragment: fragment.offset)
    return fragments


def fragment_of(parameter: nn.Parameter, stretch: Stretch, clock: VectorClock) -> Fragment:
    """A stretch of what this rank holds of a parameter, with its vectors by their full numbers."""
    shard = inner_shard(parameter)
    first = 0 if shard is None else int(shard.index[0])
    cols = tp_local_shape(parameter)[-1]
    return Fragment(stretch.start, stretch.offset, stretch.length, clock, cols, first)


def rounding_streams(
    layout: Layout, names: Mapping[nn.Parameter, str], seed: int
) -> dict[int, Stream]:
    """Draws for every bf16 tensor that the optimizer steps; it is one parameter."""
    return {
        storage_key(placement.owner): Stream(seed, "rounding", names[parameter])
        for parameter, placement in layout.placements.items()
        if placement.owner.dtype == torch.bfloat16
    }
