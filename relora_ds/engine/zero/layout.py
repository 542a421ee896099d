"""Where every trained parameter's master and moments live on this rank.

A master is in fp32, but for parameters in bf16 that are their own. The layouts without slices are
here, those that DeepSpeed cuts in `engine.deepspeed.layouts`. Every position is verified by value
when a layout is built: drift in a library is a start-up error, never a silent corruption.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed import ProcessGroup

from relora_ds.engine.deepspeed.version import SUPPORTED
from relora_ds.errors import ReloraError
from relora_ds.optim.vector_clock import Stretch
from relora_ds.parallel.shape import tp_local_shape


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
        optimizer: the optimizer that steps the owners.
        partition_group: ranks that hold parts of the same moments; None where every rank holds all
            of them.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        partition_group: ProcessGroup | None,
    ) -> None:
        self.optimizer = optimizer
        self.partition_group = partition_group
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

    def gradient(self, parameter: nn.Parameter) -> Iterator[torch.Tensor]:
        """This rank's slice of a trained parameter's gradient, as live 1-D views in order.

        It is there, summed over the data-parallel ranks, between the last backward pass of an
        update and the update.
        """
        assert parameter.grad is not None
        yield parameter.grad.view(-1)

    def await_gradients(self) -> None:  # noqa: B027
        """Wait until `gradient` may be read by the host where it lies there. Nobody waits where the
        gradients are on a device, which does its work in order."""

    def gradient_storages(self) -> Iterator[torch.Tensor]:
        """Every tensor that holds gradients on this rank at this moment."""
        for tensor in (*self.placements, *self.owners()):
            if tensor.grad is not None:
                yield tensor.grad

    def weight_storages(self, parameter: nn.Parameter) -> Iterator[torch.Tensor]:
        """Every tensor in which this rank stores a working weight, copies of it too."""
        yield parameter.data

    def gather(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """Working values of whole parameters on every rank. A collective where they are cut."""
        return [parameter.detach() for parameter in parameters]

    def take_masters(self, parameter: nn.Parameter) -> None:
        """Set the working weight of a trained parameter to its master on every rank, after an edit
        of masters. A collective where state is cut and working weights are whole."""
        self.working(parameter)[1].copy_(self.full_master(parameter))

    def write_copies(self, parameter: nn.Parameter, value: torch.Tensor) -> None:  # noqa: B027
        """Set whole copies of a working weight that are kept beside its slices, if there are any"""

    def drop_copies(self, parameter: nn.Parameter) -> None:  # noqa: B027
        """Forget such copies after an edit of the slices; the next use gathers them again."""

    def order_gathers(self) -> None:  # noqa: B027
        """Let gathers on another stream wait for the edits that this stream has queued.

        To be called once between a batch of edits and the next pass of the model. The host does not
        wait.
        """

    @property
    def weights_sharded(self) -> bool:
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
            torch.distributed.all_reduce(full, group=self.partition_group)
        return full

    def optimizer_state(self, parameter: nn.Parameter, key: str) -> torch.Tensor | None:
        """This rank's stretch of an element-wise state tensor; None before the first step, if it
        has none, or if the parameter is updated matrix-wise."""
        placement = self.placements[parameter]
        tensor = self.optimizer.state.get(placement.owner, {}).get(key)
        if tensor is None or not placement.stretch.length:
            return None
        return placement.stretch.of(tensor.view(-1))

    def take_master(self, parameter: nn.Parameter) -> None:
        """Set this rank's part of the working values to what it holds of the master."""
        placement = self.placements[parameter]
        stretch, (first, working) = placement.stretch, self.working(parameter)
        if stretch.length:  # where nothing is held, the start lies anywhere
            working.narrow(0, stretch.start - first, stretch.length).copy_(placement.master())

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
                f"the fp32 master of a parameter of shape {tuple(tp_local_shape(parameter))} was "
                f"not found where DeepSpeed {SUPPORTED} keeps it: another version is installed, or "
                f"an option moved it; install deepspeed=={SUPPORTED} and use the shipped ZeRO files"
            )


class WholeParameters(Layout):
    """The optimizer steps the parameters themselves."""

    def locate(self, parameter: nn.Parameter, group: int, index: int) -> Placement:
        return Placement(parameter, Stretch(0, 0, parameter.numel()))


class MasterCopies(Layout):
    """The optimizer steps one fp32 copy per parameter, in the same order."""

    def locate(self, parameter: nn.Parameter, group: int, index: int) -> Placement:
        master = self.optimizer.param_groups[group]["params"][index]
        return Placement(master, Stretch(0, 0, parameter.numel()))
