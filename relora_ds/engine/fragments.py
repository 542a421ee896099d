"""What the optimizer has to know of the tensors it steps: vectors with a clock, and draws."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from relora_ds.engine.layout import Layout
from relora_ds.engine.vector_adamw import storage_key
from relora_ds.engine.vector_clock import Fragment, VectorClock
from relora_ds.parallel.shape import whole_shape
from relora_ds.randomness import Stream


def clocked_fragments(
    layout: Layout, clocks: Mapping[nn.Parameter, VectorClock]
) -> dict[int, list[Fragment]]:
    """Clocked fragments of every tensor that the optimizer steps, in order of offset."""
    fragments: dict[int, list[Fragment]] = {storage_key(owner): [] for owner in layout.owners()}
    for parameter, clock in clocks.items():
        owner, stretch = layout.placements[parameter].owner, layout.placements[parameter].stretch
        if stretch.length:
            fragment = Fragment(
                stretch.start, stretch.offset, stretch.length, clock, whole_shape(parameter)[-1]
            )
            fragments[storage_key(owner)].append(fragment)
    for known in fragments.values():
        known.sort(key=lambda fragment: fragment.offset)
    return fragments


def rounding_streams(
    layout: Layout, names: Mapping[nn.Parameter, str], seed: int
) -> dict[int, Stream]:
    """Draws for every bf16 tensor that the optimizer steps; it is one parameter."""
    return {
        storage_key(placement.owner): Stream(seed, "rounding", names[parameter])
        for parameter, placement in layout.placements.items()
        if placement.owner.dtype == torch.bfloat16
    }
