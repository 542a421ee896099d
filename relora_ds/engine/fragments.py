"""Where the vectors that have a clock lie in the tensors that the optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from relora_ds.engine.layout import Layout
from relora_ds.engine.vector_adamw import storage_key
from relora_ds.engine.vector_clock import Fragment, VectorClock
from relora_ds.parallel.shape import whole_shape


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
