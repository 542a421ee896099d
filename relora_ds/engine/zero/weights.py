"""Values of parameters on top of a layout: the port `Weights`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from relora_ds.engine.zero.collectives import StateCollectives
from relora_ds.engine.zero.layout import Layout
from relora_ds.methods.train_state import Weights
from relora_ds.numerics.base_weight import (
    BaseWeight,
    add_product,
    apply_product,
    weight_times,
)
from relora_ds.numerics.batched.exchange import Exchange, WeightSlice, absorb
from relora_ds.parallel.shape import global_shape, inner_shard, method_shape, tp_local_shape
from relora_ds.parallel.tensor import TensorParallel

Beside = Callable[[torch.Tensor], Iterable[torch.Tensor]]
"""Live tensors that lie beside another one."""


class ZeroWeights(Weights):
    """Working weights and masters, whole or sliced, wherever the layout says they are.

    Args:
        layout: where working weights and masters are.
        bases: authoritative store of every frozen weight that may be edited.
        edited: called with every frozen parameter that was edited.
        collectives: sums over the ranks that hold other parts.
        beside: what else is known of the elements of a tensor that the optimizer steps: tensors
            (N,) on the host, of its size. It is forgotten of what is written.
    """

    def __init__(
        self,
        layout: Layout,
        bases: Mapping[nn.Parameter, BaseWeight],
        edited: Callable[[nn.Parameter], None],
        collectives: StateCollectives,
        beside: Beside,
    ) -> None:
        self._beside = beside
        self._layout = layout
        self._bases = bases
        self._edited = edited
        self._collectives = collectives

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return global_shape(parameter)

    def gather(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        values = self._layout.gather(parameters)
        if self._layout.weights_sharded:
            # what is kept whole was not gathered; it counts, so that the figure is an upper bound
            for value in values:
                self._collectives.count(value)
        joined, moved = _join_inner(values, parameters, self._collectives.tp)
        self._collectives.bytes_moved += moved
        return joined

    def write(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        assert not torch.is_grad_enabled(), "verbs of the state are called within no_grad"
        assert value.shape == method_shape(parameter), (value.shape, method_shape(parameter))
        shard = inner_shard(parameter)
        value = value if shard is None else shard.part(value)
        placement = self._layout.placements[parameter]
        stretch, flat = placement.stretch, value.reshape(-1)
        # both, or the next step undoes one of them: the master overwrites the working copy
        placement.master().copy_(flat[stretch.start : stretch.start + stretch.length])
        start, working = self._layout.working(parameter)
        working.copy_(flat[start : start + working.numel()])
        for kept in self._beside(placement.owner):
            stretch.of(kept).zero_()
        self._layout.write_copies(parameter, value)

    def write_frozen(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        assert not torch.is_grad_enabled(), "verbs of the state are called within no_grad"
        assert value.shape == method_shape(parameter), (value.shape, method_shape(parameter))
        start, working = self._layout.working(parameter)
        working.copy_(value.reshape(-1)[start : start + working.numel()])
        self._layout.write_copies(parameter, value)
        self._edited(parameter)

    def add_product(
        self,
        weight: nn.Parameter,
        left: torch.Tensor,
        right: torch.Tensor,
        scale: float | torch.Tensor,
        measured: bool = True,
    ) -> torch.Tensor | None:
        assert not torch.is_grad_enabled(), "verbs of the state are called within no_grad"
        start, working = self._layout.working(weight)
        add = add_product if measured else apply_product
        sums = add(self._bases[weight], working, start, left, right, scale)
        self._layout.drop_copies(weight)
        self._edited(weight)
        return sums

    def absorb(
        self, edits: Sequence[tuple[nn.Parameter, Exchange]], measured: bool
    ) -> list[torch.Tensor] | None:
        assert not torch.is_grad_enabled(), "verbs of the state are called within no_grad"
        slices = []
        for weight, exchange in edits:
            start, working = self._layout.working(weight)
            slices.append((WeightSlice(self._bases[weight], working, start), exchange))
        sums = absorb(slices, measured)
        for weight, _ in edits:
            self._layout.drop_copies(weight)
            self._edited(weight)
        return sums

    def times(self, weight: nn.Parameter, right: torch.Tensor) -> torch.Tensor:
        start, working = self._layout.working(weight)
        out = weight_times(self._bases[weight], working, start, tp_local_shape(weight)[0], right)
        return self._collectives.sum_over_slices(out) if self._layout.weights_sharded else out

    def totals(self, edits: Sequence[torch.Tensor]) -> torch.Tensor:
        sums = torch.stack(list(edits)).to(self._collectives.device)
        if self._layout.weights_sharded:
            self._collectives.sum_over_slices(sums)
        return self._collectives.sum_over_shards(sums)

    def sum_over_rows(self, value: torch.Tensor) -> torch.Tensor:
        return self._collectives.sum_over_shards(value)


def _join_inner(
    values: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter], tp: TensorParallel
) -> tuple[list[torch.Tensor], int]:
    """Whole values along r from the ranks' parts, by one all-gather for all of them.

    Args:
        values: of the parameters, as this rank holds them.

    Returns:
        The values, those of other parameters as they are, and the payload in bytes.
    """
    found = list(values)
    cut = [(n, shard) for n, p in enumerate(parameters) if (shard := inner_shard(p)) is not None]
    if not cut:
        return found, 0
    everyone = tp.join(torch.cat([found[n].reshape(-1) for n, _ in cut]), 0)
    by_rank = everyone.view(tp.size, -1)
    parts = by_rank.split([found[n].numel() for n, _ in cut], dim=1)
    for (number, shard), part in zip(cut, parts, strict=True):
        shape = tp.size, *found[number].shape
        found[number] = torch.cat(part.reshape(shape).unbind(), dim=shard.dim)
    return found, everyone.numel() * everyone.element_size()
