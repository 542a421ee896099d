"""What projections take up and exchange in an update, stated by a layer or measured without memory.

A layer that states no `footprint` is copied to the meta device and run there, forward and backward:
autograd's hooks say what is saved, the tensor-parallel group of the copy writes down what it is
asked for, and every operation shows the temporaries that it makes. Two runs of different lengths
tell what grows with the tokens from what is of a weight's size. Seen are collectives that the layer
asks its `spec.tp` for; those that it issues by itself are not.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from relora_ds.parallel.footprint import Exchange, Footprint, Operation, Pass, UpdateSize
from relora_ds.parallel.linear import LinearSpec, Projection
from relora_ds.parallel.shape import shard_of, tp_local_shape
from relora_ds.parallel.tensor import TensorParallel, exchange


@functools.lru_cache(maxsize=8)  # a plan asks for several stages of one model
def footprints(model: nn.Module, size: UpdateSize) -> dict[Projection, Footprint]:
    """Footprint of every projection of a model, in the model's order.

    Layers that differ in nothing but their names and values are measured once.

    Args:
        model: a `Llama` of which the structure does not change any more.
        size: of the update.
    """
    known: dict[Hashable, Footprint] = {}
    found = {}
    for layer in (module for module in model.modules() if isinstance(module, Projection)):
        kind = _kind(layer)
        if kind not in known:
            known[kind] = footprint_of(layer, size)
        found[layer] = known[kind]
    return found


def footprint_of(layer: Projection, size: UpdateSize) -> Footprint:
    """What the layer states, or what a run on the meta device shows."""
    stated = layer.footprint(size)
    return measured_footprint(layer, size) if stated is None else stated


def measured_footprint(layer: Projection, size: UpdateSize) -> Footprint:
    """What a run of a copy on the meta device shows; neither the layer nor its group is touched.

    Args:
        layer: on any device, also as ZeRO stage 3 leaves it; its own shard under tensor
            parallelism.
        size: of the update.
    """
    rehearsal = _Rehearsal(layer, size)
    passes = [rehearsal.micro_batch(size.tokens) for _ in range(min(size.micro_batches, 2))]
    # all further micro-batches are as the second one, which may find what the first one left
    times = [1, size.micro_batches - 1][: len(passes)]
    grown = layer.spec.tp.size
    longer = _Rehearsal(layer, size).micro_batch(size.tokens + grown)
    return Footprint(
        exchanges=_exchanges(zip(passes, times, strict=True)),
        held_bytes=rehearsal.held_bytes(),
        saved_bytes_per_token=(longer.saved_bytes - passes[0].saved_bytes) // grown,
        scratch_bytes=passes[0].temporaries.most_of_weights(longer.temporaries),
    )


def _kind(layer: Projection) -> Hashable:
    """Equal for two layers that differ in nothing but their names and values."""
    parameters = [
        (name, tp_local_shape(p), p.requires_grad) for name, p in layer.named_parameters()
    ]
    buffers = [(name, buffer.shape, buffer.dtype) for name, buffer in layer.named_buffers()]
    settings = [
        (name, value)
        for name, value in vars(layer).items()
        if isinstance(value, bool | int | float | str)
    ]
    spec = replace(layer.spec, name="")
    return type(layer), spec, (*parameters, *buffers, *settings)


@dataclass(frozen=True)
class _ListeningGroup(TensorParallel):
    """A tensor-parallel group that writes down what it is asked for on the meta device."""

    heard: list[tuple[Operation, int]] = field(default_factory=list, compare=False)

    @staticmethod
    def like(tp: TensorParallel) -> _ListeningGroup:
        """A listening group of the size of `tp`, with this process in its place."""
        return _ListeningGroup(**{each.name: getattr(tp, each.name) for each in fields(tp)})

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        if self.size == 1 or self.sequence:
            return super().enter(x)
        return exchange(x, _as_it_is, self.sum)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        if self.size == 1 or self.sequence:
            return super().leave(x)
        return exchange(x, self.sum, _as_it_is)

    def join(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        whole = super().join(part, dim)
        return self._hear("all_gather", whole, whole)

    def divide(self, share: torch.Tensor, dim: int) -> torch.Tensor:
        return self._hear("reduce_scatter", share, super().divide(share, dim))

    def _reduce(self, x: torch.Tensor, op: Any) -> torch.Tensor:
        return self._hear("all_reduce", x, x)

    def _hear(
        self, operation: Operation, whole: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        if self.size > 1:
            self.heard.append((operation, whole.numel()))
        return result


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclass(frozen=True)
class _MicroBatch:
    """What one forward and backward pass showed."""

    heard: dict[Pass, list[tuple[Operation, int]]]
    saved_bytes: int
    temporaries: _Temporaries


def _exchanges(passes: Iterable[tuple[_MicroBatch, int]]) -> tuple[Exchange, ...]:
    """Exchanges of all micro-batches, each with the number of times that it is repeated."""
    calls: Counter[tuple[Operation, Pass]] = Counter()
    elements: Counter[tuple[Operation, Pass]] = Counter()
    for micro_batch, times in passes:
        for phase, heard in micro_batch.heard.items():
            for operation, count in heard:
                calls[operation, phase] += times
                elements[operation, phase] += times * count
    return tuple(Exchange(*kind, number, elements[kind]) for kind, number in calls.items())


class _Rehearsal:
    """A copy of a layer on the meta device, as it is at the start of an update.

    Args:
        layer: what is copied.
        size: of the update.
    """

    def __init__(self, layer: Projection, size: UpdateSize) -> None:
        self._group = _ListeningGroup.like(layer.spec.tp)
        self._dtype = dtype = size.dtype
        # what a deep copy finds in its memo it takes instead of copying
        memo: dict[int, Any] = {id(held): None for held in layer.held()}
        memo[id(layer.spec)] = replace(layer.spec, tp=self._group)
        for parameter in layer.parameters():
            empty = torch.empty(tp_local_shape(parameter), dtype=dtype, device="meta")
            memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
        for buffer in layer.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        self._layer = copy.deepcopy(layer, memo)
        self._layer.begin_update(size)
        width, rows = _input_and_output(layer)
        self._weight = width * rows
        _, self._width = layer.spec.product_shape(rows, width, size)

    def held_bytes(self) -> int:
        """Bytes that the copy has held on to."""
        return sum(held.numel() * held.element_size() for held in self._layer.held())

    def micro_batch(self, tokens: int) -> _MicroBatch:
        """Run the copy forward and backward."""
        layer, shape = self._layer, (1, tokens, self._width)
        x = torch.empty(shape, dtype=self._dtype, device="meta", requires_grad=True)
        trained = [p for p in layer.parameters() if p.requires_grad]
        own = {_key(tensor) for tensor in (x, *layer.parameters(), *layer.buffers())}
        saved: dict[StorageWeakRef, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[_key(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        temporaries = _Temporaries(own, self._weight)
        with temporaries, saved_tensors_hooks(pack, _as_it_is), torch.enable_grad():
            out = self._forward(x)
            forward = self._take_heard()
            gradients = torch.autograd.grad(out, [x, *trained], out.detach(), allow_unused=True)
        held = {_key(tensor) for tensor in layer.held()}
        temporaries.leave_out(held | {_key(grad) for grad in gradients if grad is not None})
        return _MicroBatch(
            {"forward": forward, "backward": self._take_heard()},
            sum(size for key, size in saved.items() if key not in own | held),
            temporaries,
        )

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layer as the model does: twice, if it is recomputed in the backward pass."""
        if not self._layer.recomputed:
            return self._layer.product(x)
        out = checkpoint(self._layer.product, x, use_reentrant=False, preserve_rng_state=False)
        return cast(torch.Tensor, out)

    def _take_heard(self) -> list[tuple[Operation, int]]:
        heard = list(self._group.heard)
        self._group.heard.clear()
        return heard


def _input_and_output(layer: Projection) -> tuple[int, int]:
    """Widths of what goes in and comes out here: those of this rank's shard, if it has one."""
    spec: LinearSpec = layer.spec
    width, rows = spec.in_features, spec.out_features
    if all(shard_of(parameter) is None for parameter in layer.parameters()):
        return width, rows
    start, stop = spec.tp.span(rows if spec.style == "column" else width)
    return (width, stop - start) if spec.style == "column" else (stop - start, rows)


def _key(tensor: torch.Tensor) -> StorageWeakRef:
    """A storage, which on the meta device has no address; equal while one of its keys is alive."""
    return StorageWeakRef(tensor.untyped_storage())


class _Temporaries(TorchDispatchMode):
    """Follows the storages that operations make: which are alive after each of them.

    Args:
        known: storages that were there before.
        weight: elements of the projection's weight.
    """

    def __init__(self, known: Iterable[StorageWeakRef], weight: int) -> None:
        super().__init__()
        self._weight = weight
        self._seen = set(known)
        self._made: list[StorageWeakRef] = []
        self._sizes: list[tuple[int, int]] = []  # elements and bytes
        self._alive: list[list[int]] = []
        self._left_out: set[StorageWeakRef] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := _key(tensor)) not in self._seen:
                self._seen.add(key)
                self._made.append(key)
                held = tensor.untyped_storage().nbytes()
                self._sizes.append((held // tensor.element_size(), held))
        alive = [number for number, key in enumerate(self._made) if not key.expired()]
        self._alive.append(alive)
        return out

    def leave_out(self, storages: Iterable[StorageWeakRef]) -> None:
        """Do not count these as temporaries."""
        self._left_out |= set(storages)

    def most_of_weights(self, longer: _Temporaries) -> int:
        """Most bytes at one moment of temporaries that are as large as the weight, or larger.

        Args:
            longer: the same operations on more tokens; what is larger there is no weight.
        """
        alike = zip(self._sizes, longer._sizes, strict=True)
        of_weights = {
            number
            for number, (here, there) in enumerate(alike)
            if here == there
            and here[0] >= self._weight
            and self._made[number] not in self._left_out
        }
        sums = (sum(self._sizes[n][1] for n in alive if n in of_weights) for alive in self._alive)
        return max(sums, default=0)
