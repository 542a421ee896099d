"""Where every trained parameter's master and moments live on this rank.

A master is in fp32, but for parameters in bf16 that are their own.

One class per layout that DeepSpeed 0.19.8 can produce, chosen once by the type of its optimizer; an
unknown type is an error. Positions come from storage offsets, not from DeepSpeed's own fragment
bookkeeping (which is wrong under some options and stale after a load), and every position is
verified by value when the layout is built: drift in the library is a start-up error, never a
silent corruption.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from deepspeed import comm
from torch import nn
from torch.distributed import ProcessGroup

from relora_ds.engine.per_layer import Masters
from relora_ds.engine.vector_clock import Stretch
from relora_ds.errors import ConfigError, ReloraError
from relora_ds.parallel.shape import whole_shape


@dataclass(frozen=True)
class Placement:
    """One parameter's stretch of the tensor that the optimizer steps on this rank."""

    owner: torch.Tensor
    """The tensor under which the optimizer keeps its state."""
    stretch: Stretch
    """Elements of the parameter, and where they lie in `owner`; its length may be 0."""

    def master(self) -> torch.Tensor:
        """This rank's values of the parameter as the optimizer has them, a live 1-D view."""
        return self.stretch.of(self.owner.detach().view(-1))


class Layout(ABC):
    """Placements of all trained parameters.

    Args:
        groups: parameters per optimizer group, as they were before DeepSpeed took them over.
        optimizer: the client optimizer that DeepSpeed drives.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        partition_group: ProcessGroup | None,
    ) -> None:
        self.optimizer = optimizer
        self.partition_group = partition_group
        """Ranks that hold parts of the same moments; None where every rank holds all of them."""
        self.placements: dict[nn.Parameter, Placement] = {}
        for number, group in enumerate(groups):
            for index, parameter in enumerate(group):
                placement = self.locate(parameter, number, index)
                self.placements[parameter] = placement
                self._verify(parameter)

    @abstractmethod
    def locate(self, parameter: nn.Parameter, group: int, index: int) -> Placement:
        """Find parameter number `index` of a group."""

    def owners(self) -> Iterator[torch.Tensor]:
        """Every tensor that the optimizer steps on this rank."""
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def working(self, parameter: nn.Parameter) -> tuple[int, torch.Tensor]:
        """What this rank stores of a working weight, trained or frozen.

        Returns:
            Index of its first element in the flattened parameter, and the elements as a live 1-D
            view.
        """
        return 0, parameter.data.view(-1)

    def whole(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """Working values of whole parameters on every rank. A collective where they are cut."""
        return [parameter.detach() for parameter in parameters]

    def write_copies(self, parameter: nn.Parameter, value: torch.Tensor) -> None:  # noqa: B027
        """Set whole copies of a working weight that are kept beside its slices, if there are any"""

    def drop_copies(self, parameter: nn.Parameter) -> None:  # noqa: B027
        """Forget such copies after an edit of the slices; the next use gathers them again."""

    @property
    def weights_cut(self) -> bool:
        """Whether a rank stores only a slice of each working weight."""
        return False

    def full_master(self, parameter: nn.Parameter) -> torch.Tensor:
        """All fp32 values of a parameter, 1-D, on every rank. A collective where state is cut."""
        placement, stretch = self.placements[parameter], self.placements[parameter].stretch
        # beside the parameter: an offloaded master is where no collective can reach it
        full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        full[stretch.start : stretch.start + stretch.length] = placement.master()
        if self.partition_group is not None:
            # every element is non-zero on one rank at most, so the sum is exact
            comm.all_reduce(full, group=self.partition_group)
        return full

    def optimizer_state(self, parameter: nn.Parameter, key: str) -> torch.Tensor | None:
        """This rank's stretch of a state tensor; None before the first step or if it has none."""
        placement = self.placements[parameter]
        state = self.optimizer.state.get(placement.owner)
        if not state or not placement.stretch.length:
            return None
        return placement.stretch.of(state[key].view(-1))

    def mismatch(self, parameter: nn.Parameter) -> torch.Tensor:
        """Whether a trained parameter's working values are not its rounded masters: bool scalar."""
        placement = self.placements[parameter]
        stretch, (first, working) = placement.stretch, self.working(parameter)
        start = stretch.start - first
        working = working[start : start + stretch.length]
        return (placement.master().to(working) != working).any()

    def _verify(self, parameter: nn.Parameter) -> None:
        if bool(self.mismatch(parameter)):
            raise ReloraError(
                f"the fp32 master of a parameter of shape {tuple(whole_shape(parameter))} was not "
                "found where DeepSpeed 0.19.8 keeps it: another version is installed, or an option "
                "moved it; install the pinned version and use the shipped ZeRO files"
            )


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

    def whole(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        cut = [p for p in parameters if not _has_copy(p)]
        gathered = dict(zip(cut, self._gather(cut), strict=True)) if cut else {}
        return [gathered[p] if p in gathered else p.detach() for p in parameters]

    def _gather(self, parameters: Sequence[nn.Parameter]) -> Iterator[torch.Tensor]:
        """One all-gather for all of them."""
        device = parameters[0].device
        slices = [cast(Any, p).ds_tensor.data.to(device) for p in parameters]
        mine = torch.cat(slices)
        everyone = mine.new_empty(self._size * mine.numel())
        comm.all_gather_into_tensor(everyone, mine, group=self.partition_group)
        at, by_rank = 0, everyone.view(self._size, -1)
        for parameter, part in zip(parameters, slices, strict=True):
            shape = whole_shape(parameter)
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
    def weights_cut(self) -> bool:
        return True

    def full_master(self, parameter: nn.Parameter) -> torch.Tensor:
        raise AssertionError("stage 3 hands slices over, never whole parameters")


def slice_of(elements: int, rank: int, size: int) -> tuple[int, int]:
    """First element and number of elements of a rank's slice of a flattened parameter.

    Slices are equal but for padding, which is not counted; the last ones may be empty.
    """
    share = -(-elements // size)
    start = min(elements, rank * share)
    return start, min(share, elements - start)


def _has_copy(parameter: nn.Parameter) -> bool:
    return parameter.data.numel() == whole_shape(parameter).numel()


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
