"""The layouts that DeepSpeed can produce, chosen once by the type of its optimizer wrapper.

`engine.zero.layout` says what a layout is and verifies it by value. Positions come from storage
offsets, not from DeepSpeed's own fragment bookkeeping, which is wrong under some options and stale
after a load. The protocols say which private members of the wrappers are read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.distributed import ProcessGroup

from relora_ds.engine.deepspeed.flat_gradients import FlatGradientOptimizer
from relora_ds.engine.zero.layout import Layout, MasterCopies, Placement, WholeParameters
from relora_ds.errors import ConfigError
from relora_ds.optim.vector_clock import Stretch
from relora_ds.parallel.shape import slice_of, tp_local_shape

W = TypeVar("W")

GradientLists = dict[int, list[torch.Tensor] | None]
"""Tensors by number of the flat tensor that they belong to; None between updates."""


class _FlatWrapper(Protocol):
    """`DeepSpeedZeroOptimizer`."""

    averaged_gradients: GradientLists
    """What the owner's update reads: tiles of it, in order."""
    all_grad_tensors: GradientLists
    """Sums over micro-batches."""


class _Bf16Wrapper(Protocol):
    """`BF16_Optimizer`."""

    fp32_groups_gradients_flat: list[torch.Tensor]
    """Whole gradients by group."""
    fp32_groups_gradient_flat_partition: list[torch.Tensor]
    """Views of this rank's parts of them."""


class _Stream(Protocol):
    """A stream of the accelerator."""

    def wait_stream(self, stream: object) -> None:
        """Let what is queued later wait for what is queued in `stream` now; nobody else waits."""
        ...


class _Gathers(Protocol):
    """`DeepSpeedZeRoOffload`."""

    _DeepSpeedZeRoOffload__allgather_stream: _Stream | None
    """Where parameters are gathered ahead of their use; None without streams."""


class _Stage3Wrapper(Protocol):
    """`DeepSpeedZeroOptimizer_Stage3`."""

    fp32_partitioned_groups_flat: list[torch.Tensor]
    """Masters by sub-group."""
    averaged_gradients: GradientLists
    """What a sub-group's update reads: tiles of its flat tensor, in order."""
    grad_partitions_flat_buffer: torch.Tensor
    """Where those tiles lie."""
    grad_position: dict[int, list[int]]
    """Sub-group, offset in its flat tensor and length of a parameter's slice."""

    parameter_offload: _Gathers
    """Whatever gathers parameters for the model's passes."""

    def get_param_id(self, param: nn.Parameter) -> int:
        """The key of `grad_position`."""
        ...


class _CutParameter(Protocol):
    """What DeepSpeed hangs on a parameter that it cut at stage 3."""

    ds_numel: int
    """Elements of the parameter before it was cut."""
    ds_tensor: torch.Tensor
    """This rank's slice, 1-D; the last ones are padded."""
    ds_secondary_tensor: torch.Tensor | None
    """hpZ: this rank's slice of the second copy within the node, while there is one."""

    def partition(self) -> None:
        """Drop the gathered copy."""
        ...


class _Sliced(Layout, Generic[W]):
    """A rank steps its slices of many parameters in few flat tensors."""

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        partition_group: ProcessGroup,
        wrapper: W,
    ) -> None:
        self._wrapper = wrapper
        self._rank = torch.distributed.get_rank(partition_group)
        super().__init__(groups, optimizer, partition_group)

    @abstractmethod
    def tiles(self, number: int) -> list[torch.Tensor] | None:
        """Tensors that hold the reduced gradient of an owner, one behind the other; None outside of
        an update."""

    def await_gradients(self) -> None:
        # DeepSpeed queues copies to the host on streams of its own, and waits for them in its step
        if any(owner.grad is not None for owner in self.owners()):  # offloaded
            accelerator: Any = get_accelerator()
            accelerator.synchronize()

    def gradient(self, parameter: nn.Parameter) -> Iterator[torch.Tensor]:
        owner, stretch = self.placements[parameter].owner, self.placements[parameter].stretch
        if owner.grad is not None:  # offloaded
            yield stretch.of(owner.grad.view(-1))
            return
        tiles = self.tiles(next(n for n, other in enumerate(self.owners()) if other is owner))
        assert tiles is not None, "asked for outside of an update"
        at = 0
        for tile in tiles:
            first, last = max(stretch.offset, at), min(stretch.end, at + tile.numel())
            if first < last:
                yield tile.view(-1)[first - at : last - at]
            at += tile.numel()


class _Flat(_Sliced[W]):
    """Each group is one flat tensor, and a rank owns one equal slice of it.

    `parameter.data` is a view into the group's working buffer, so its storage offset is its
    position in the flat tensor.
    """

    def locate(self, parameter: nn.Parameter, group: int, index: int) -> Placement:
        owner = self.optimizer.param_groups[group]["params"][0]
        # first element of this rank's slice, in the parameter's own coordinates
        first = self._rank * owner.numel() - parameter.data.storage_offset()
        start = max(0, first)
        length = max(0, min(parameter.numel(), first + owner.numel()) - start)
        return Placement(owner, Stretch(start, start - first if length else 0, length))


class FlatPartitions(_Flat[_FlatWrapper]):
    """Stages 1 and 2."""

    def tiles(self, number: int) -> list[torch.Tensor] | None:
        return self._wrapper.averaged_gradients[number]

    def gradient_storages(self) -> Iterator[torch.Tensor]:
        yield from super().gradient_storages()
        yield from _listed(self._wrapper.averaged_gradients)
        yield from _listed(self._wrapper.all_grad_tensors)


class FlatGradientPartitions(FlatPartitions):
    """Stages 1 and 2 with gradients that lie in flat tensors as long as the engine lives."""

    def gradient_storages(self) -> Iterator[torch.Tensor]:
        yield from super().gradient_storages()
        yield from cast(FlatGradientOptimizer, self._wrapper).flats


class Bf16Partitions(_Flat[_Bf16Wrapper]):
    """Stage 1 with gradients added up in fp32, which lie whole beside the flat tensors."""

    def tiles(self, number: int) -> list[torch.Tensor]:
        return [self._wrapper.fp32_groups_gradient_flat_partition[number]]

    def gradient_storages(self) -> Iterator[torch.Tensor]:
        yield from super().gradient_storages()
        yield from self._wrapper.fp32_groups_gradients_flat


class PartitionedParameters(_Sliced[_Stage3Wrapper]):
    """Stage 3: every parameter, frozen ones too, is cut into one equal slice per rank.

    Slices of trained parameters have their masters in flat tensors, one per sub-group; DeepSpeed's
    own map from gradients to these flats says where. Between steps `parameter.data` is empty,
    except for small parameters of which it keeps a gathered copy.
    """

    def locate(self, parameter: nn.Parameter, group: int, index: int) -> Placement:
        # through the map and not through DeepSpeed's accessors: they copy what is offloaded
        number, offset, _ = self._wrapper.grad_position[self._wrapper.get_param_id(parameter)]
        start, working = self.working(parameter)
        flats = self._wrapper.fp32_partitioned_groups_flat
        return Placement(flats[number], Stretch(start, offset, working.numel()))

    def owners(self) -> Iterator[torch.Tensor]:
        # DeepSpeed empties the optimizer's groups between steps
        yield from self._wrapper.fp32_partitioned_groups_flat

    @property
    def _size(self) -> int:
        return torch.distributed.get_world_size(self.partition_group)

    def working(self, parameter: nn.Parameter) -> tuple[int, torch.Tensor]:
        cut = _cut(parameter)
        start, length = slice_of(cut.ds_numel, self._rank, self._size)
        return start, cut.ds_tensor.data[:length]

    def tiles(self, number: int) -> list[torch.Tensor] | None:
        return self._wrapper.averaged_gradients[number]

    def gradient_storages(self) -> Iterator[torch.Tensor]:
        yield from super().gradient_storages()
        yield from _listed(self._wrapper.averaged_gradients)
        yield self._wrapper.grad_partitions_flat_buffer

    def order_gathers(self) -> None:
        # DeepSpeed lets the model wait for its gathers, but not the gathers for us
        stream = self._wrapper.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
        if stream is not None:
            accelerator: Any = get_accelerator()
            stream.wait_stream(accelerator.current_stream())

    def weight_storages(self, parameter: nn.Parameter) -> Iterator[torch.Tensor]:
        yield from super().weight_storages(parameter)
        cut = _cut(parameter)
        yield cut.ds_tensor
        if cut.ds_secondary_tensor is not None:
            yield cut.ds_secondary_tensor

    def gather(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        cut = [p for p in parameters if not _has_copy(p)]
        gathered = dict(zip(cut, self._gather(cut), strict=True)) if cut else {}
        return [gathered[p] if p in gathered else p.detach() for p in parameters]

    def _gather(self, parameters: Sequence[nn.Parameter]) -> Iterator[torch.Tensor]:
        """One all-gather for all of them."""
        device = parameters[0].device
        slices = [_cut(p).ds_tensor.data.to(device) for p in parameters]
        mine = torch.cat(slices)
        everyone = mine.new_empty(self._size * mine.numel())
        torch.distributed.all_gather_into_tensor(everyone, mine, group=self.partition_group)
        at, by_rank = 0, everyone.view(self._size, -1)
        for parameter, part in zip(parameters, slices, strict=True):
            shape = tp_local_shape(parameter)
            flat = by_rank[:, at : at + part.numel()].reshape(-1)
            yield flat[: shape.numel()].view(shape)
            at += part.numel()

    def write_copies(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        if _has_copy(parameter):
            parameter.data.copy_(value)
        _cut(parameter).ds_secondary_tensor = None

    def drop_copies(self, parameter: nn.Parameter) -> None:
        if _has_copy(parameter):
            _cut(parameter).partition()
        # hpZ's copy within the node, which DeepSpeed makes anew from what it gathers next; not
        # earlier than here, because partition() makes one too
        _cut(parameter).ds_secondary_tensor = None

    def take_masters(self, parameter: nn.Parameter) -> None:
        self.working(parameter)[1].copy_(self.placements[parameter].master())
        self.drop_copies(parameter)

    @property
    def weights_sharded(self) -> bool:
        return True

    def full_master(self, parameter: nn.Parameter) -> torch.Tensor:
        raise AssertionError("stage 3 hands slices over, never whole parameters")


def _listed(gradients: GradientLists) -> Iterator[torch.Tensor]:
    for tensors in gradients.values():
        yield from tensors or ()


def _cut(parameter: nn.Parameter) -> _CutParameter:
    return cast(_CutParameter, parameter)


def _has_copy(parameter: nn.Parameter) -> bool:
    return parameter.data.numel() == tp_local_shape(parameter).numel()


def build_layout(
    wrapper: object,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Sequence[nn.Parameter]],
    data_parallel_group: ProcessGroup,
) -> Layout:
    """The layout that belongs to DeepSpeed's optimizer wrapper.

    Args:
        wrapper: `engine.optimizer` after `deepspeed.initialize`.
        optimizer: the client optimizer that was handed in.

    Raises:
        ConfigError: the options lead to a layout that is not supported.
        ReloraError: a master does not hold the value of its parameter.
    """
    if wrapper is optimizer:
        return WholeParameters(groups, optimizer, None)
    name = type(wrapper).__name__
    if name == "FP16_UnfusedOptimizer":
        return MasterCopies(groups, optimizer, None)
    if name in ("DeepSpeedZeroOptimizer", "FlatGradientOptimizer"):
        flat = cast(_FlatWrapper, wrapper)
        kind = FlatPartitions if name == "DeepSpeedZeroOptimizer" else FlatGradientPartitions
        return kind(groups, optimizer, data_parallel_group, flat)
    if name == "BF16_Optimizer":
        bf16 = cast(_Bf16Wrapper, wrapper)
        return Bf16Partitions(groups, optimizer, data_parallel_group, bf16)
    if name == "DeepSpeedZeroOptimizer_Stage3":
        cut = cast(_Stage3Wrapper, wrapper)
        return PartitionedParameters(groups, optimizer, data_parallel_group, cut)
    raise ConfigError(
        f"DeepSpeed chose the optimizer wrapper {name}, whose state layout is not supported: "
        "use a ZeRO stage without options that change how masters are kept"
    )
