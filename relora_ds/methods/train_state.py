"""What a method may touch of a running engine: five ports that hide where ZeRO keeps what.

`TrainState` has one port per concern: `weights`, `moments`, `vectors`, `host` and `gradients`. They
are declared here, the last in `dense_gradients`, and implemented once, in `engine.zero`. Their
verbs work at every ZeRO stage. They are called on every rank, in the same order, within
`torch.no_grad`, and only between optimizer steps.

Where tensor parallelism shards a parameter, a method sees this rank's part of it (its *method
shape*); what ZeRO makes of that part is hidden, and so is a shard of a factor along r.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from relora_ds.methods.dense_gradients import Gradients
from relora_ds.numerics.batched.exchange import Exchange
from relora_ds.numerics.draws import draw_uniform
from relora_ds.numerics.transfers import upload
from relora_ds.parallel.shape import TPShard
from relora_ds.randomness import Stream

_GATHERED_BYTES = 32 << 20  # a collective's latency is negligible from here on


@dataclass(frozen=True)
class MomentShard:
    """This rank's stretch of one parameter's moments, as live 1-D views of equal length."""

    start: int
    """Index of the first element in the flattened parameter, or in the `shard` of it."""
    moments: tuple[torch.Tensor, ...]
    """The first one, and the second one of an optimizer that has it, as Adam."""
    shard: TPShard | None = None
    """The part of the parameter that `start` counts in; None where that is all of it."""

    @property
    def exp_avg(self) -> torch.Tensor:
        """The first moment."""
        return self.moments[0]

    @property
    def exp_avg_sq(self) -> torch.Tensor:
        """The second moment, of an optimizer that has it."""
        return self.moments[1]

    def uniform(self, stream: Stream) -> torch.Tensor:
        """The stream's values for these elements, by their place in the global parameter; fp32."""
        count, device = self.moments[0].numel(), self.moments[0].device
        if self.shard is None:
            return draw_uniform(stream, self.start, count, device)
        return stream.uniform_at(upload(self.shard.flat_index(self.start, count), device))


class Weights(ABC):
    """Values of parameters: what is trained, and frozen weights that are edited."""

    @abstractmethod
    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Global shape of a parameter, also where only a part of it is here."""

    @abstractmethod
    def gather(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """Working values of small trained parameters, the same on every rank.

        The one verb that gathers, where parameters are sliced over ranks: never ask it for a weight
        that is as large as a projection. The values are valid until the next verb that writes.
        """

    def gather_in_turn(
        self, requests: Sequence[Sequence[nn.Parameter]]
    ) -> Iterator[list[torch.Tensor]]:
        """Working values as `gather` returns them, for one request after the other.

        Several requests share a collective, as long as their values stay within some megabytes. The
        values of a request survive what is written to the parameters of other ones.
        """
        batch: list[Sequence[nn.Parameter]] = []
        held = 0
        for request in requests:
            size = sum(self.shape(p).numel() * p.element_size() for p in request)
            if batch and held + size > _GATHERED_BYTES:
                yield from self._gather_batch(batch)
                batch, held = [], 0
            batch.append(request)
            held += size
        yield from self._gather_batch(batch)

    def _gather_batch(
        self, batch: Sequence[Sequence[nn.Parameter]]
    ) -> Iterator[list[torch.Tensor]]:
        values = iter(self.gather([parameter for request in batch for parameter in request]))
        for request in batch:
            yield [next(values) for _ in request]

    @abstractmethod
    def write(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Set a trained parameter to `value` everywhere it lives: master and working copies.

        Args:
            value: of the parameter's method shape, any float dtype, the same on every data-parallel
                rank.
        """

    @abstractmethod
    def write_frozen(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Set a small frozen parameter to `value` everywhere it lives.

        Args:
            value: of the parameter's method shape, any float dtype, the same on every data-parallel
                rank.
        """

    @abstractmethod
    def add_product(
        self,
        weight: nn.Parameter,
        left: torch.Tensor,
        right: torch.Tensor,
        scale: float | torch.Tensor,
        measured: bool = True,
    ) -> torch.Tensor | None:
        """weight += scale * left @ right for a frozen weight, each rank on its own slice.

        Args:
            weight: (m, n), frozen.
            left: (m, k), the same on every rank.
            right: (k, n), likewise.
            scale: a number, or a scalar on the device.
            measured: whether to check the result, which costs several passes over the weight;
                without, the edit is a single pass.

        Returns:
            The fields of a `WeightEdit` of this rank's part, (5,), float64, not waited for;
            `totals` turns them into the whole weight's. None if `measured` is false.
        """

    @abstractmethod
    def absorb(
        self, edits: Sequence[tuple[nn.Parameter, Exchange]], measured: bool
    ) -> list[torch.Tensor] | None:
        """Let frozen weights make up for exchanges of vectors, each rank on its own slices.

        Args:
            edits: weights with the exchanges of their factors, the same on every rank.
            measured: as for `add_product`.

        Returns:
            What `add_product` returns, for each weight. None if `measured` is false.
        """

    @abstractmethod
    def times(self, weight: nn.Parameter, right: torch.Tensor) -> torch.Tensor:
        """weight (m, n) @ right (n, k) on the authoritative values of an edited weight.

        Returns:
            (m, k), fp32, the same on every data-parallel rank.
        """

    @abstractmethod
    def totals(self, edits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Figures of whole weights from those of this rank's parts, in one sum for all of them.

        Returns:
            (edits, 5), float64, the same on every rank; on the device, nothing is waited for.
        """

    @abstractmethod
    def sum_over_rows(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a small tensor that was formed from this rank's rows of a weight, over the ranks
        that hold its other rows."""


class Moments(ABC):
    """Moments of trained parameters, on whatever slices of them this rank holds: Adam's two, or the
    momentum of an optimizer of matrices."""

    @property
    @abstractmethod
    def updates(self) -> int:
        """Updates that went into them in this phase; fewer than its steps if some were skipped."""

    @abstractmethod
    def shard(self, parameter: nn.Parameter) -> MomentShard | None:
        """This rank's part of the moments; None if it owns none or no step was taken yet."""

    @abstractmethod
    def count_non_zero(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        """Elements of all moments that are not zero, over all ranks, every element once.

        Returns:
            An int64 scalar on the device, not waited for.
        """

    @abstractmethod
    def order_statistics(
        self, parameters: Sequence[nn.Parameter], ks: Sequence[int]
    ) -> list[tuple[torch.Tensor, ...]]:
        """Exact k-th smallest magnitude of each moment, without gathering them.

        Args:
            parameters: trained ones.
            ks: 1-based k for each parameter, over all of its elements.

        Returns:
            An fp32 scalar per parameter and moment, the same on every rank; beside the moments, and
            waited for only if these are not where ranks exchange.
        """

    @abstractmethod
    def rotate(self, rotations: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """Carry Adam's moments of matrices over to another basis of their rows.

        A row m of the first moment becomes m C, a row v of the second one v (C o C), elementwise
        squares: the moments of the gradient's coordinates in the new basis, where coordinates in
        the old one are uncorrelated. Rows that a slice cuts are completed by one small exchange.

        Args:
            rotations: C (r, r), fp32, of trained parameters (L, r), the same on every data-parallel
                rank.
        """

    @abstractmethod
    def restart(self, parameter: nn.Parameter) -> int:
        """Begin the bias correction of every vector of a clocked parameter anew; returns how many
        vectors that were."""


@dataclass(frozen=True)
class LocatedVectors:
    """Some vectors of a clocked parameter; implementations add where they have them."""

    parameter: nn.Parameter
    """The clocked parameter."""
    index: torch.Tensor
    """int64, (k,), on the CPU, without repetition: the vectors, by number."""


class Vectors(ABC):
    """Single vectors of clocked parameters: rows or columns with an Adam step of their own.

    Verbs take vectors that were located before: numbers that were drawn on the host then travel to
    the device together.
    """

    @abstractmethod
    def live(self, parameter: nn.Parameter, ahead: int = 0) -> torch.Tensor:
        """Which vectors of a clocked parameter the update after the next `ahead` ones trains.

        Returns:
            Bool, (vectors,), on the CPU.
        """

    @abstractmethod
    def locate(
        self,
        requests: Sequence[tuple[nn.Parameter, torch.Tensor]],
        numbers: Sequence[torch.Tensor] = (),
    ) -> tuple[list[LocatedVectors], list[torch.Tensor]]:
        """Find where this rank has vectors, and bring that to the device in one copy for all.

        The host does not wait. What was located stays valid for the life of the run.

        Args:
            requests: clocked parameters and numbers of their vectors, int64, (k,), on the CPU,
                without repetition.
            numbers: further int64 tensors of the CPU, which travel along.

        Returns:
            An entry per request, and `numbers` on the device.
        """

    @abstractmethod
    def gather(
        self,
        factors: Sequence[LocatedVectors],
        stored: Sequence[tuple[int, torch.Tensor]] = (),
    ) -> list[torch.Tensor]:
        """Vectors, the same on every rank, in one exchange for all of them.

        Args:
            factors: vectors whose working values are returned.
            stored: vectors that the method itself keeps: their length, and this rank's
                `HostMemory.span` of them, (k, span), in the factors' dtype.

        Returns:
            One (k, length) per entry of `factors`, then of `stored`: vectors are rows, whatever
            their axis. They are copies.
        """

    @abstractmethod
    def write(self, written: Sequence[tuple[LocatedVectors, torch.Tensor]]) -> None:
        """Set vectors everywhere they live: master and working copies.

        Args:
            written: which, no parameter twice, and their values, (k, length), the same on every
                rank.
        """

    @abstractmethod
    def reset(self, vectors: Sequence[LocatedVectors], frozen: int) -> int:
        """Forget what the optimizer knows of some vectors: moments and the count of their steps.

        Args:
            vectors: which, no parameter twice.
            frozen: updates during which they stay bit-identical; their count goes on meanwhile.

        Returns:
            Moment elements that this rank set to zero.
        """


class HostMemory(ABC):
    """Memory of a node's host for vectors that a method keeps beside the model."""

    @abstractmethod
    def span(self, length: int) -> tuple[int, int]:
        """Elements [start, stop) of a vector of `length` that this rank keeps."""

    @abstractmethod
    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeros in host memory: one copy per node, if its ranks have the same span.

        Every rank of the node asks in the same order.
        """

    @property
    @abstractmethod
    def is_writer(self) -> bool:
        """Whether this rank is the one that writes what `tensor` returned."""

    @property
    @abstractmethod
    def node_bytes(self) -> int:
        """Size of what `tensor` returned, over all copies on this node."""

    @abstractmethod
    def collect(self, part: torch.Tensor, length: int) -> torch.Tensor | None:
        """Stored vectors (k, length) put together from the ranks' spans, on the CPU.

        Returns:
            None except on the rank that writes checkpoints.
        """


class TrainState(ABC):
    """The partitioned state of a run, as five ports.

    Args:
        weights: values of parameters.
        moments: Adam's moments of what is trained.
        vectors: single vectors of clocked parameters.
        host: memory of the node's host.
        gradients: dense gradients of frozen weights.
    """

    def __init__(
        self,
        weights: Weights,
        moments: Moments,
        vectors: Vectors,
        host: HostMemory,
        gradients: Gradients,
    ) -> None:
        self.weights = weights
        self.moments = moments
        self.vectors = vectors
        self.host = host
        self.gradients = gradients
        self.before_event: Callable[[str, bytes], None] = lambda kind, state: None
        """To be called first in an event, with its kind and with what it is going to do or with the
        method's own state, as far as that must be the same on all ranks: those that are not about
        to do the same end here instead of in each other's collectives."""

    @property
    @abstractmethod
    def bytes_moved(self) -> int:
        """Payload of the collectives that verbs have taken part in so far, the probe's excepted."""

    @abstractmethod
    def probe(self) -> torch.Tensor | None:
        """Output of the working model on a fixed batch, fp32; None if the run has none."""
