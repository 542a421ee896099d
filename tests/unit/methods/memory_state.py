"""The port `TrainState` over plain tensors: what a method sees, without an engine.

Moments live in dictionaries by parameter, order statistics come from `torch.kthvalue`, an edited
weight may have an authoritative store of the engine's beside its working values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from relora_ds.methods.interface import projection_layers
from relora_ds.methods.train_state import (
    Gradients,
    HostMemory,
    LocatedVectors,
    Moments,
    MomentShard,
    TrainState,
    Vectors,
    Weights,
)
from relora_ds.numerics.base_weight import (
    KINDS,
    BaseWeight,
    Precision,
    add_product,
    apply_product,
    weight_times,
)
from relora_ds.numerics.batched.exchange import Exchange, WeightSlice, absorb
from relora_ds.optim.vector_clock import VectorClock


@dataclass
class StoredMoments:
    """Both Adam moments of a whole parameter."""

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


class MemoryWeights(Weights):
    """Parameters as they are; an edited one goes through its store."""

    def __init__(self, bases: dict[nn.Parameter, BaseWeight]) -> None:
        self.bases = bases

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape

    def gather(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        return [parameter.detach() for parameter in parameters]

    def write(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        assert value.shape == parameter.shape
        parameter.data.copy_(value)

    def write_frozen(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        self.write(parameter, value)

    def add_product(
        self,
        weight: nn.Parameter,
        left: torch.Tensor,
        right: torch.Tensor,
        scale: float | torch.Tensor,
        measured: bool = True,
    ) -> torch.Tensor | None:
        add = add_product if measured else apply_product
        return add(self.bases[weight], weight.data.view(-1), 0, left, right, scale)

    def absorb(
        self, edits: Sequence[tuple[nn.Parameter, Exchange]], measured: bool
    ) -> list[torch.Tensor] | None:
        parts = [(WeightSlice(self.bases[w], w.data.view(-1), 0), each) for w, each in edits]
        return absorb(parts, measured)

    def times(self, weight: nn.Parameter, right: torch.Tensor) -> torch.Tensor:
        working = weight.data.view(-1)
        return weight_times(self.bases[weight], working, 0, weight.shape[0], right)

    def totals(self, edits: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(edits))

    def sum_over_rows(self, value: torch.Tensor) -> torch.Tensor:
        return value


class MemoryMoments(Moments):
    """Moments from a dictionary; order statistics from `torch.kthvalue`.

    Args:
        stored: of what is trained.
        restarted: takes the parameters whose steps were reset, in order.
        clocks: of parameters that have one; a parameter without counts as one vector.
        completed: updates that the optimizer has made.
    """

    def __init__(
        self,
        stored: dict[nn.Parameter, StoredMoments],
        restarted: list[nn.Parameter],
        clocks: Mapping[nn.Parameter, VectorClock] | None = None,
        completed: Callable[[], int] = lambda: 0,
    ) -> None:
        self.stored = stored
        self._restarted, self._clocks, self._completed = (
            restarted,
            {} if clocks is None else clocks,
            completed,
        )

    @property
    def updates(self) -> int:
        return self._completed()

    def rotate(self, rotations: Mapping[nn.Parameter, torch.Tensor]) -> None:
        for parameter, rotation in rotations.items():
            stored = self.stored[parameter]
            stored.exp_avg = stored.exp_avg @ rotation
            stored.exp_avg_sq = stored.exp_avg_sq @ rotation.square()

    def shard(self, parameter: nn.Parameter) -> MomentShard | None:
        if parameter not in self.stored:
            return None
        stored = self.stored[parameter]
        return MomentShard(0, (stored.exp_avg.view(-1), stored.exp_avg_sq.view(-1)))

    def count_non_zero(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        held = [self.shard(parameter) for parameter in parameters]
        found = [shard for shard in held if shard is not None]
        counts = [s.exp_avg.count_nonzero() + s.exp_avg_sq.count_nonzero() for s in found]
        return torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.int64)

    def order_statistics(
        self, parameters: Sequence[nn.Parameter], ks: Sequence[int]
    ) -> list[tuple[torch.Tensor, ...]]:
        found = []
        for parameter, k in zip(parameters, ks, strict=True):
            shard = self.shard(parameter)
            assert shard is not None
            both = (shard.exp_avg, shard.exp_avg_sq)
            first, second = (moment.abs().kthvalue(k).values for moment in both)
            found.append((first, second))
        return found

    def restart(self, parameter: nn.Parameter) -> int:
        self._restarted.append(parameter)
        clock = self._clocks.get(parameter)
        if clock is None:
            return 1
        clock.restart(self._completed())
        return clock.count


class MemoryVectors(Vectors):
    """Rows and columns of parameters that have a clock.

    Args:
        clocks: of the parameters.
        stored: their moments.
        completed: updates that the optimizer has made.
    """

    def __init__(
        self,
        clocks: dict[nn.Parameter, VectorClock],
        stored: dict[nn.Parameter, StoredMoments],
        completed: Callable[[], int],
    ) -> None:
        self.clocks, self._stored, self._completed = clocks, stored, completed

    def live(self, parameter: nn.Parameter, ahead: int = 0) -> torch.Tensor:
        return self.clocks[parameter].live(self._completed() + ahead)

    def locate(
        self,
        requests: Sequence[tuple[nn.Parameter, torch.Tensor]],
        numbers: Sequence[torch.Tensor] = (),
    ) -> tuple[list[LocatedVectors], list[torch.Tensor]]:
        return [LocatedVectors(*request) for request in requests], list(numbers)

    def gather(
        self,
        factors: Sequence[LocatedVectors],
        stored: Sequence[tuple[int, torch.Tensor]] = (),
    ) -> list[torch.Tensor]:
        chosen = [(each.parameter, each.index) for each in factors]
        found = [self._rows(p.detach(), p)[index].clone() for p, index in chosen]
        return [*found, *(part for _, part in stored)]

    def write(self, written: Sequence[tuple[LocatedVectors, torch.Tensor]]) -> None:
        for vectors, values in written:
            parameter, index = vectors.parameter, vectors.index
            self._rows(parameter.data, parameter)[index] = values.to(parameter.dtype)

    def reset(self, vectors: Sequence[LocatedVectors], frozen: int) -> int:
        cleared = 0
        for each in vectors:
            parameter, index = each.parameter, each.index
            moments, clock = self._stored[parameter], self.clocks[parameter]
            for moment in (moments.exp_avg, moments.exp_avg_sq):
                self._rows(moment, parameter)[index] = 0.0
            clock.restart(self._completed(), index)
            clock.freeze(self._completed() + frozen, index)
            cleared += 2 * len(index) * parameter.shape[1 - clock.axis]
        return cleared

    def _rows(self, tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """A view in which the parameter's vectors are rows."""
        return tensor if self.clocks[parameter].axis == 0 else tensor.t()


class MemoryGradients(Gradients):
    """One process: what it has is the mean, and it owns everything."""

    def __init__(self) -> None:
        self.batch: Callable[[], Iterable[torch.Tensor]] = tuple
        self.run_pass: Callable[[torch.Tensor], None] = lambda tokens: None
        """Runs the model forward and backward on a micro-batch."""

    @property
    def owners(self) -> int:
        return 1

    def passes(self) -> Iterator[int]:
        micro_batches = list(self.batch())
        for left, tokens in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
            yield left
            with torch.enable_grad():
                self.run_pass(tokens)

    def mean(self, weight: nn.Parameter, part: torch.Tensor, turn: int) -> torch.Tensor | None:
        return part

    def spread(self, value: torch.Tensor, turn: int) -> torch.Tensor:
        return value


class MemoryHost(HostMemory):
    """Plain tensors, which count."""

    def __init__(self) -> None:
        self._bytes = 0

    def span(self, length: int) -> tuple[int, int]:
        return 0, length

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.zeros(*shape, dtype=dtype)
        self._bytes += tensor.numel() * tensor.element_size()
        return tensor

    @property
    def is_writer(self) -> bool:
        return True

    @property
    def node_bytes(self) -> int:
        return self._bytes

    def collect(self, part: torch.Tensor, length: int) -> torch.Tensor | None:
        return part


class MemoryState(TrainState):
    """A run of one process.

    Args:
        stored: moments of what is trained.
        moments: another port for them.
    """

    def __init__(
        self,
        stored: dict[nn.Parameter, StoredMoments] | None = None,
        moments: Moments | None = None,
    ) -> None:
        self.stored = {} if stored is None else stored
        self.bases: dict[nn.Parameter, BaseWeight] = {}
        self.clocks: dict[nn.Parameter, VectorClock] = {}
        self.restarted: list[nn.Parameter] = []
        """Parameters whose steps were reset, in order."""
        self.probe_output: Callable[[], torch.Tensor | None] = lambda: None
        self.completed = 0
        """Updates that the optimizer has made."""

        def completed() -> int:
            return self.completed

        super().__init__(
            MemoryWeights(self.bases),
            moments or MemoryMoments(self.stored, self.restarted, self.clocks, completed),
            MemoryVectors(self.clocks, self.stored, completed),
            MemoryHost(),
            MemoryGradients(),
        )

    @property
    def bytes_moved(self) -> int:
        return 0

    def probe(self) -> torch.Tensor | None:
        return self.probe_output()

    def fill_moments(self, seed: int) -> None:
        """Random moments for everything trained, after one more update; second are positive."""
        self.completed += 1
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
                state.stored[parameter] = StoredMoments(first, second)
            else:
                store = KINDS[precision]
                state.bases[parameter] = store(parameter.data.view(-1), exact.view(-1))
    state.fill_moments(seed=0)
    return state
