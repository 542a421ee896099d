"""The one seam between training methods and everything else.

`Method` is what a method overrides; its defaults are full-rank training. `TrainState` is all that a
method may touch of a running engine: it is declared here, implemented once in `engine`, and hides
where ZeRO keeps masters and moments. A method never sees an optimizer, a partition or a stage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from relora_ds.config.base import Section
from relora_ds.methods.schedule import Schedule
from relora_ds.parallel.linear import DenseLinear, LinearSpec, Projection
from relora_ds.parallel.shape import TensorShard, shard_of, whole_shape
from relora_ds.randomness import Stream

_GATHERED_BYTES = 32 << 20  # a collective's latency is negligible from here on


@dataclass(frozen=True)
class ParameterGroup:
    """Trainable parameters that share a learning rate and a decay rule."""

    role: str
    """`dense` takes `optimizer.lr`, `adapter` takes `optimizer.adapter_lr`."""
    decays: bool
    """Whether `optimizer.weight_decay` applies."""
    parameters: list[nn.Parameter]
    """Never empty, never frozen: DeepSpeed mishandles both."""


@dataclass(frozen=True)
class MomentShard:
    """This rank's stretch of one parameter's Adam moments, as live 1-D views of equal length."""

    start: int
    """Index of the first element in the flattened parameter, or in the `shard` of it."""
    exp_avg: torch.Tensor
    """First moment."""
    exp_avg_sq: torch.Tensor
    """Second moment."""
    shard: TensorShard | None = None
    """The part of the parameter that `start` counts in; None where that is the whole."""
    counted: bool = True
    """Whether this is the one of several identical copies that sums over ranks count."""

    def uniform(self, stream: Stream) -> torch.Tensor:
        """The stream's values for these elements, by their place in the full parameter; fp32."""
        count, device = self.exp_avg.numel(), self.exp_avg.device
        if self.shard is None:
            return stream.uniform(self.start, count, device)
        return stream.uniform_at(self.shard.flat_index(self.start, count).to(device))


@dataclass(frozen=True)
class WeightEdit:
    """How an edit of a frozen weight came out, over the elements that this rank edited."""

    elements: int
    """Elements whose authoritative value changed."""
    error_sq: float
    """Squared norm of (intended - stored) @ x on probe inputs x, in float64."""
    output_sq: float
    """Squared norm of the edited weight @ x on the same inputs."""
    intended_sq: float
    """Squared Frobenius norm of the intended change."""
    lost_sq: float
    """Squared Frobenius norm of the part of it that the stored weight did not take up."""


@dataclass(frozen=True)
class Event:
    """What a method did at a step boundary, for the log."""

    kind: str
    """`merge`, `switch` or `refresh`."""
    function_drift: float
    """Largest relative change of a projection's output, on the authoritative weights."""
    moments_reset_fraction: float
    """Share of the non-zero Adam moments of the adapters that were set to zero."""
    details: dict[str, float] = field(default_factory=dict)
    """Further figures by metric name."""


class TrainState(ABC):
    """The partitioned state of a run, through verbs that work at every ZeRO stage.

    Verbs are called on every rank, in the same order, inside `torch.no_grad`, and only between
    optimizer steps. Where tensor parallelism cuts a parameter, "whole" below means this rank's
    part of it; what ZeRO makes of that part is hidden.
    """

    bytes_moved: int
    """Payload of the collectives that verbs have taken part in so far, the probe's excepted."""

    @abstractmethod
    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Full shape of a parameter, also where only a part of it is here."""

    @abstractmethod
    def whole(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """Working values of small trained parameters, whole and the same on every rank.

        The one verb that gathers, where parameters are cut over ranks: never ask it for a weight
        that is as large as a projection. The values are valid until the next verb that writes.
        """

    def whole_in_turn(
        self, requests: Sequence[Sequence[nn.Parameter]]
    ) -> Iterator[list[torch.Tensor]]:
        """What `whole` returns, for one request after the other, with few exchanges.

        Several requests share a collective, as long as their values stay within some megabytes. The
        values of a request survive what is written to the parameters of other ones.
        """
        batch: list[Sequence[nn.Parameter]] = []
        held = 0
        for request in requests:
            size = sum(self.shape(p).numel() * p.element_size() for p in request)
            if batch and held + size > _GATHERED_BYTES:
                yield from self._whole_batch(batch)
                batch, held = [], 0
            batch.append(request)
            held += size
        yield from self._whole_batch(batch)

    def _whole_batch(self, batch: Sequence[Sequence[nn.Parameter]]) -> Iterator[list[torch.Tensor]]:
        values = iter(self.whole([parameter for request in batch for parameter in request]))
        for request in batch:
            yield [next(values) for _ in request]

    @abstractmethod
    def moments(self, parameter: nn.Parameter) -> MomentShard | None:
        """This rank's part of the moments; None if it owns none or no step was taken yet."""

    @abstractmethod
    def write(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Set a trained parameter to `value` everywhere it lives: master and working copies.

        Args:
            value: the full value, any float dtype, identical on every rank.
        """

    @abstractmethod
    def add_product(
        self,
        weight: nn.Parameter,
        left: torch.Tensor,
        right: torch.Tensor,
        scale: float,
        measured: bool = True,
    ) -> WeightEdit | None:
        """weight += scale * left @ right for a frozen weight, each rank on its own slice.

        Args:
            weight: (m, n), frozen.
            left: (m, k), the same on every rank.
            right: (k, n), likewise.
            measured: whether to check the result, which costs several passes over the weight and
                waits for the device; without, the edit is a single pass.

        Returns:
            The report of this rank's part, `total_edits` makes it the whole weight's; None if it
            was not asked for.
        """

    @abstractmethod
    def weight_times(self, weight: nn.Parameter, right: torch.Tensor) -> torch.Tensor:
        """weight (m, n) @ right (n, k) on the authoritative values of an edited weight.

        Returns:
            (m, k), fp32, the same on every rank.
        """

    @abstractmethod
    def total_edits(self, edits: Sequence[WeightEdit]) -> list[WeightEdit]:
        """Reports of whole weights from those of this rank's parts, the same on every rank."""

    @abstractmethod
    def order_statistics(
        self, values: Sequence[torch.Tensor], ranks: Sequence[int]
    ) -> list[torch.Tensor]:
        """Exact k-th smallest magnitude of distributed tensors, without gathering them.

        Args:
            values: this rank's stretch of each tensor, fp32, 1-D, possibly empty; signs are
                ignored.
            ranks: 1-based k for each tensor, over the whole of it.

        Returns:
            One fp32 scalar per tensor, the same on every rank.
        """

    @abstractmethod
    def total(self, counts: Sequence[int]) -> list[int]:
        """Sums of integers over all ranks that hold moments which are counted."""

    @abstractmethod
    def sum_over_parts(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a small tensor over the ranks that hold other rows of the same weights."""

    @abstractmethod
    def reset_steps(self, parameter: nn.Parameter) -> int:
        """Restart the bias correction of every vector of a clocked parameter; returns how many."""

    @abstractmethod
    def live_vectors(self, parameter: nn.Parameter, ahead: int = 0) -> torch.Tensor:
        """Which vectors of a clocked parameter the update after the next `ahead` ones trains.

        Returns:
            Bool, (vectors,), on the CPU.
        """

    @abstractmethod
    def whole_vectors(
        self,
        factors: Sequence[tuple[nn.Parameter, torch.Tensor]],
        stored: Sequence[tuple[int, torch.Tensor]] = (),
    ) -> list[torch.Tensor]:
        """Vectors, whole and the same on every rank, in one exchange for all of them.

        Args:
            factors: clocked parameters and the vectors that are asked for, int64, (k,), on the CPU;
                their working values are returned.
            stored: vectors that the method itself keeps: their length, and this rank's
                `own_span` of them, (k, span), in the factors' dtype.

        Returns:
            One (k, length) per entry of `factors`, then of `stored`: vectors are rows, whatever
            their axis. They are copies.
        """

    @abstractmethod
    def write_vectors(
        self, parameter: nn.Parameter, index: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Set vectors of a clocked parameter everywhere they live: master and working copies.

        Args:
            index: int64, (k,), on the CPU, without repetition.
            values: (k, length), the same on every rank.
        """

    @abstractmethod
    def reset_vectors(self, parameter: nn.Parameter, index: torch.Tensor, frozen: int) -> int:
        """Forget what Adam knows of some vectors: moments and the count of their steps.

        Args:
            index: int64, (k,), on the CPU.
            frozen: updates during which they stay bit-identical; their count goes on meanwhile.

        Returns:
            Moment elements that this rank set to zero.
        """

    @abstractmethod
    def own_span(self, length: int) -> tuple[int, int]:
        """Elements [start, stop) of a vector that this rank keeps of what methods store."""

    @abstractmethod
    def node_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeros in host memory for `own_span`s: one copy per node, if its ranks have the same span.

        Every rank of the node asks in the same order.
        """

    @abstractmethod
    def writes_node(self) -> bool:
        """Whether this rank is the one that writes what `node_tensor` returned."""

    @abstractmethod
    def node_bytes(self) -> int:
        """Size of what `node_tensor` returned, over all copies on this node."""

    @abstractmethod
    def collect(self, part: torch.Tensor, length: int) -> torch.Tensor | None:
        """Stored vectors (k, length) put together from the ranks' spans, on the CPU.

        Returns:
            None except on the rank that writes checkpoints.
        """

    @abstractmethod
    def probe(self) -> torch.Tensor | None:
        """Output of the working model on a fixed batch, fp32; None if the run has none."""


ConfigT = TypeVar("ConfigT", bound=Section)


class Method(Generic[ConfigT]):
    """Full-rank training; a method is what it overrides.

    Args:
        config: the method's own configuration section.
        seed: the run's seed.
        steps: optimizer steps for which this method is in charge; `step` below counts within them.
        dtype: what the model computes in; it is initialised in fp32 and cast afterwards.
    """

    def __init__(
        self, config: ConfigT, seed: int, steps: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.config = config
        self.seed = seed
        self.steps = steps
        self.dtype = dtype

    def linear(self, spec: LinearSpec) -> Projection:
        """The module that stands in for a projection; its parameters are allocated, not drawn."""
        return DenseLinear(spec)

    def initialize(self, layer: Projection, dense: torch.Tensor) -> None:
        """Set a projection so that it starts from the dense weight (out, in), fp32.

        The weight is a random draw, a loaded checkpoint's or the warm start's; a method with
        factors derives them from it or lets the frozen weight absorb them. A method that is warm
        started sets `weight` to the dense weight plus a term that does not depend on it: where
        weights are cut, it is called with zeros and slices of the dense weight are added.
        """
        assert isinstance(layer, DenseLinear)
        layer.weight.copy_(dense)

    def dense_weight(self, layer: Projection) -> torch.Tensor:
        """The dense weight (out, in) in fp32 that computes the same as the projection."""
        assert isinstance(layer, DenseLinear)
        return layer.weight.detach().float()

    def lay_out(self, layer: Projection) -> None:
        """Fill what a projection needs to know how it is cut, where its parameters have no memory.

        For most of them the shapes say it all.
        """

    def parameter_groups(self, model: nn.Module) -> list[ParameterGroup]:
        """Trainable parameters by role and decay. Projections count as adapters.

        What tensor parallelism cuts is apart from what it does not: the flat tensors that ZeRO
        makes of a group must be cut alike on all ranks that hold the same parameters.
        """
        projections = {
            id(p) for layer in projection_layers(model).values() for p in layer.parameters()
        }
        groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                role = "adapter" if id(parameter) in projections else "dense"
                key = role, self.decays(name, parameter), shard_of(parameter) is None
                groups.setdefault(key, []).append(parameter)
        return [ParameterGroup(role, decays, found) for (role, decays, _), found in groups.items()]

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies to a trained parameter: to matrices, not to vectors."""
        return len(whole_shape(parameter)) >= 2

    def vector_axes(self, model: nn.Module) -> dict[nn.Parameter, int]:
        """Parameters whose vectors need an Adam step count of their own, with the vectors' axis."""
        return {}

    def edited_weights(self, model: nn.Module) -> list[nn.Parameter]:
        """Frozen weights that the method edits during training."""
        return []

    def parked_elements(self, model: nn.Module) -> tuple[int, int]:
        """Most working-precision elements that the method keeps beside the model in the end: in
        the memory of each process's device, and of each node's host."""
        return 0, 0

    def lr_multiplier(self, step: int, schedule: Schedule) -> float:
        """Factor on every learning rate for the update that follows `step` completed ones."""
        return schedule(step)

    def before_step(self, state: TrainState, model: nn.Module, step: int) -> Event | None:
        """Called after `step` completed updates, before the next forward pass."""
        return None

    def after_step(self, state: TrainState, model: nn.Module, step: int) -> Event | None:
        """Called right after update number `step` (counted from 1) was applied."""
        return None

    def attach(self, state: TrainState, model: nn.Module) -> None:
        """Called once when the engine stands, before a state is restored or a step is taken."""

    def figures(self, state: TrainState, model: nn.Module) -> dict[str, Any]:
        """Metrics for a line of the log, since the last one or so far; may wait for the device.

        For what happens too often to be an `Event` of its own: `method/event` names it here if it
        happened since the last line. Called on every rank.
        """
        return {}

    def replicas(self) -> dict[str, torch.Tensor]:
        """State of its own, by name, that must be the same on every rank at every moment."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot derive from the step number, the same for any number of copies
        of the model.

        Tensors are values of the dictionary itself, and may be live; everything else is plain
        types. Called on every rank; what rank 0 returns is saved.
        """
        return {}

    def join_states(
        self, states: Sequence[dict[str, Any]], shards: Sequence[Mapping[str, TensorShard]]
    ) -> dict[str, Any]:
        """The state for the whole model from what `state_dict` returned on tensor-parallel ranks.

        Args:
            states: with their tensors, one per rank.
            shards: which part of every cut parameter each rank holds.
        """
        return states[0]

    def part_of_state(
        self, state: dict[str, Any], shards: Mapping[str, TensorShard]
    ) -> dict[str, Any]:
        """A rank's part of the state for the whole model: the inverse of `join_states`."""
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; called on every rank after `attach`."""


def projection_layers(model: nn.Module) -> dict[str, Projection]:
    """The modules that a method put in place of projections, by full name, in model order."""
    return {m.spec.name: m for m in model.modules() if isinstance(m, Projection)}
