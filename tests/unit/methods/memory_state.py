"""The port `TrainState` over plain tensors: what a method sees, without an engine.

Moments live in dictionaries by parameter, order statistics come from `torch.kthvalue`, an edited
weight may have an authoritative store of the engine's beside its working values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from relora_ds.methods.interface import projection_layers
from relora_ds.methods.train_state import MomentShard, TrainState
from relora_ds.numerics.base_weight import (
    KINDS,
    BaseWeight,
    Precision,
    WeightEdit,
    add_product,
    apply_product,
    weight_times,
)
from relora_ds.optim.vector_clock import VectorClock


@dataclass
class Moments:
    """Both Adam moments of a whole parameter."""

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


@dataclass
class MemoryState(TrainState):
    """A run of one process."""

    stored: dict[nn.Parameter, Moments] = field(default_factory=dict)
    bases: dict[nn.Parameter, BaseWeight] = field(default_factory=dict)
    probe_output: Callable[[], torch.Tensor | None] = lambda: None
    reset: list[nn.Parameter] = field(default_factory=list)
    """Parameters whose steps were reset, in order."""
    bytes_moved: int = 0
    clocks: dict[nn.Parameter, VectorClock] = field(default_factory=dict)
    completed: int = 0
    """Updates that the optimizer has made."""
    handed_out: int = 0
    """Bytes of `node_tensor`s."""

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape

    def gather(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        return [parameter.detach() for parameter in parameters]

    def moments(self, parameter: nn.Parameter) -> MomentShard | None:
        if parameter not in self.stored:
            return None
        stored = self.stored[parameter]
        return MomentShard(0, stored.exp_avg.view(-1), stored.exp_avg_sq.view(-1))

    def write(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        assert value.shape == parameter.shape
        parameter.data.copy_(value)

    def add_product(
        self,
        weight: nn.Parameter,
        left: torch.Tensor,
        right: torch.Tensor,
        scale: float,
        measured: bool = True,
    ) -> WeightEdit | None:
        add = add_product if measured else apply_product
        return add(self.bases[weight], weight.data.view(-1), 0, left, right, scale)

    def weight_times(self, weight: nn.Parameter, right: torch.Tensor) -> torch.Tensor:
        working = weight.data.view(-1)
        return weight_times(self.bases[weight], working, 0, weight.shape[0], right)

    def total_edits(self, edits: Sequence[WeightEdit]) -> list[WeightEdit]:
        return list(edits)

    def order_statistics(
        self, values: Sequence[torch.Tensor], ranks: Sequence[int]
    ) -> list[torch.Tensor]:
        pairs = zip(values, ranks, strict=True)
        return [value.abs().kthvalue(rank).values for value, rank in pairs]

    def total(self, counts: Sequence[int]) -> list[int]:
        return list(counts)

    def sum_over_parts(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def reset_steps(self, parameter: nn.Parameter) -> int:
        self.reset.append(parameter)
        return 1

    def live_vectors(self, parameter: nn.Parameter, ahead: int = 0) -> torch.Tensor:
        return self.clocks[parameter].live(self.completed + ahead)

    def gather_vectors(
        self,
        factors: Sequence[tuple[nn.Parameter, torch.Tensor]],
        stored: Sequence[tuple[int, torch.Tensor]] = (),
    ) -> list[torch.Tensor]:
        found = [self._rows(p.detach(), p)[index].clone() for p, index in factors]
        return [*found, *(part for _, part in stored)]

    def write_vectors(
        self, parameter: nn.Parameter, index: torch.Tensor, values: torch.Tensor
    ) -> None:
        self._rows(parameter.data, parameter)[index] = values

    def reset_vectors(self, parameter: nn.Parameter, index: torch.Tensor, frozen: int) -> int:
        moments, clock = self.stored[parameter], self.clocks[parameter]
        for moment in (moments.exp_avg, moments.exp_avg_sq):
            self._rows(moment, parameter)[index] = 0.0
        clock.restart(self.completed, index)
        clock.freeze(self.completed + frozen, index)
        return 2 * len(index) * parameter.shape[1 - clock.axis]

    def _rows(self, tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """A view in which the parameter's vectors are rows."""
        return tensor if self.clocks[parameter].axis == 0 else tensor.t()

    def own_span(self, length: int) -> tuple[int, int]:
        return 0, length

    def node_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.zeros(*shape, dtype=dtype)
        self.handed_out += tensor.numel() * tensor.element_size()
        return tensor

    def writes_node(self) -> bool:
        return True

    def node_bytes(self) -> int:
        return self.handed_out

    def collect(self, part: torch.Tensor, length: int) -> torch.Tensor | None:
        return part

    def probe(self) -> torch.Tensor | None:
        return self.probe_output()

    def fill_moments(self, seed: int) -> None:
        """Random moments for everything trained; second ones are positive."""
        generator = torch.Generator().manual_seed(seed)
        for moments in self.stored.values():
            moments.exp_avg.normal_(generator=generator)
            moments.exp_avg_sq.uniform_(0.1, 1.0, generator=generator)

    def exact(self, weight: nn.Parameter) -> torch.Tensor:
        """Authoritative value of an edited weight, float64."""
        return self.bases[weight].load(weight.data.view(-1), 0).view(weight.shape).double()


def memory_state(model: nn.Module, precision: Precision) -> MemoryState:
    """A state with random moments for everything trained, and a store for each frozen weight.

    With a 16-bit store the model's parameters are turned into bf16 first.
    """
    state = MemoryState()
    for layer in projection_layers(model).values():
        for parameter in layer.parameters():
            exact = parameter.detach().clone()
            if precision == "bf16_residual":
                parameter.data = parameter.data.bfloat16()
            if parameter.requires_grad:
                first, second = torch.empty_like(exact), torch.empty_like(exact)
                state.stored[parameter] = Moments(first, second)
            else:
                store = KINDS[precision]
                state.bases[parameter] = store(parameter.data.view(-1), exact.view(-1))
    state.fill_moments(seed=0)
    return state
