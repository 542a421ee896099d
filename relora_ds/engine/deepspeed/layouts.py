"""The layouts that DeepSpeed 0.19.8 can produce, chosen once by the type of its optimizer.

An unknown type is an error. `engine.zero.layout` says what a layout is and verifies it by value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed import ProcessGroup

from relora_ds.engine.per_layer import Masters
from relora_ds.engine.zero.layout import Layout, Placement
from relora_ds.errors import ConfigError
from relora_ds.optim.vector_clock import Stretch
from relora_ds.parallel.shape import slice_of, tp_local_shape


class WholeParameters(Layout):
    """Stage 0 in fp32, or without masters: the optimizer steps the parameters themselves."""

    def locate(self, parameter: nn.Parameter, group: int, index: int) -> Placement:
        return Placement(parameter, Stretch(0, 0, parameter.numel()))


class MasterCopies(Layout):
    """Stage 0 in bf16: the optimizer steps one fp32 copy per parameter, in the same order."""

    def locate(self, parameter: nn.Parameter, group: int, index: int) -> Placement:
        master = self.optimizer.param_groups[group]["params"][index]
        return Placement(master, Stretch(0, 0, parameter.numel()))


class FlatPartitions(Layout):
    """Stages 1 and 2: each group is one flat tensor, and a rank owns one equal slice of it.

    `parameter.data` is a view into the group's working buffer, so its storage offset is its
    position in the flat tensor.
    """

    def locate(self, parameter: nn.Parameter, group: int, index: int) -> Placement:
        owner = self.optimizer.param_groups[group]["params"][0]
        assert self.partition_group is not None
        rank = torch.distributed.get_rank(self.partition_group)
        # first element of this rank's slice, in the parameter's own coordinates
        first = rank * owner.numel() - parameter.data.storage_offset()
        start = max(0, first)
        length = max(0, min(parameter.numel(), first + owner.numel()) - start)
        return Placement(owner, Stretch(start, start - first if length else 0, length))


class Bf16Partitions(FlatPartitions):
    """Stage 1 with gradients added up in fp32: DeepSpeed's `BF16_Optimizer`.

    Its flat tensors are cut like those of stage 1, with whole fp32 gradients beside them.
    """


class PartitionedParameters(Layout):
    """Stage 3: every parameter, frozen ones too, is cut into one equal slice per rank.

    Slices of trained parameters have their masters in flat tensors, one per sub-group; DeepSpeed's
    own map from gradients to these flats says where. Between steps `parameter.data` is empty,
    except for small parameters of which it keeps a gathered copy.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        partition_group: ProcessGroup,
        wrapper: Any,
    ) -> None:
        self._wrapper = wrapper
        self._rank = torch.distributed.get_rank(partition_group)
        self._size = torch.distributed.get_world_size(partition_group)
        super().__init__(groups, optimizer, partition_group)

    def locate(self, parameter: nn.Parameter, group: int, index: int) -> Placement:
        # through the map and not through DeepSpeed's accessors: they copy what is offloaded
        number, offset, _ = self._wrapper.grad_position[self._wrapper.get_param_id(parameter)]
        start, working = self.working(parameter)
        flats = self._wrapper.fp32_partitioned_groups_flat
        return Placement(flats[number], Stretch(start, offset, working.numel()))

    def owners(self) -> Iterator[torch.Tensor]:
        # DeepSpeed empties the optimizer's groups between steps
        yield from self._wrapper.fp32_partitioned_groups_flat

    def working(self, parameter: nn.Parameter) -> tuple[int, torch.Tensor]:
        zero = cast(Any, parameter)
        start, length = slice_of(zero.ds_numel, self._rank, self._size)
        return start, zero.ds_tensor.data[:length]

    def gather(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        cut = [p for p in parameters if not _has_copy(p)]
        gathered = dict(zip(cut, self._gather(cut), strict=True)) if cut else {}
        return [gathered[p] if p in gathered else p.detach() for p in parameters]

    def _gather(self, parameters: Sequence[nn.Parameter]) -> Iterator[torch.Tensor]:
        """One all-gather for all of them."""
        device = parameters[0].device
        slices = [cast(Any, p).ds_tensor.data.to(device) for p in parameters]
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
        cast(Any, parameter).ds_secondary_tensor = None

    def drop_copies(self, parameter: nn.Parameter) -> None:
        if _has_copy(parameter):
            cast(Any, parameter).partition()
        # hpZ's copy within the node, which DeepSpeed makes anew from what it gathers next; not
        # earlier than here, because partition() makes one too
        cast(Any, parameter).ds_secondary_tensor = None

    @property
    def weights_sharded(self) -> bool:
        return True

    def full_master(self, parameter: nn.Parameter) -> torch.Tensor:
        raise AssertionError("stage 3 hands slices over, never whole parameters")


def _has_copy(parameter: nn.Parameter) -> bool:
    return parameter.data.numel() == tp_local_shape(parameter).numel()


def build_layout(
    wrapper: Any,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Sequence[nn.Parameter]],
    data_parallel_group: ProcessGroup,
) -> Layout:
    """The layout that belongs to DeepSpeed's optimizer.

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
    if name == "FP16_UnfusedOptimizer" or isinstance(wrapper, Masters):
        return MasterCopies(groups, optimizer, None)
    if name == "DeepSpeedZeroOptimizer":
        return FlatPartitions(groups, optimizer, data_parallel_group)
    if name == "BF16_Optimizer":
        return Bf16Partitions(groups, optimizer, data_parallel_group)
    if name == "DeepSpeedZeroOptimizer_Stage3":
        return PartitionedParameters(groups, optimizer, data_parallel_group, wrapper)
    raise ConfigError(
        f"DeepSpeed chose the optimizer wrapper {name}, whose state layout is not supported: "
        "use a ZeRO stage without options that change how masters are kept"
    )
