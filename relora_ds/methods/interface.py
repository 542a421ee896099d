"""The one seam between training methods and everything else.

A `Method` describes: which modules stand in for projections, what of them is trained, edited or
clocked, how it is updated, what a run must offer. It holds no state and needs no memory, so that
planning asks it on a model without storage. `Method.start` gives a `Session`, which acts on one
live engine between updates; all that it may touch of the engine is the `TrainState` that it is
given. The defaults of both are full-rank training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from relora_ds.config.base import Section
from relora_ds.config.sections import OptimizerConfig
from relora_ds.methods.requirements import Requirements
from relora_ds.methods.schedule import Schedule
from relora_ds.methods.train_state import TrainState
from relora_ds.model.init import EMBEDDING, HEAD
from relora_ds.optim.matrix import PAIR, MatrixOptimizer
from relora_ds.optim.matrix_wise.scale import Scale
from relora_ds.optim.matrix_wise.spectral import SpectralPair
from relora_ds.parallel.linear import DenseLinear, LinearSpec, Projection
from relora_ds.parallel.shape import shard_of, tp_local_shape


@dataclass(frozen=True)
class ParameterGroup:
    """Trainable parameters that share a learning rate and a decay rule."""

    role: str
    """`dense` takes `optimizer.lr`, `adapter` takes `optimizer.adapter_lr`, `pair`
    `optimizer.spectral.lr`."""
    decays: bool
    """Whether `optimizer.weight_decay` applies."""
    parameters: list[nn.Parameter]
    """Never empty, never frozen: DeepSpeed mishandles both."""


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
    """Further metrics by name."""


@dataclass(frozen=True)
class Report:
    """What a method says in a line of the log about what happens too often for an `Event` each."""

    metrics: dict[str, Any] = field(default_factory=dict)
    """Metrics by name, since the last line or so far."""
    event: str | None = None
    """Kind of event that happened since the last line: processes are then compared."""


@dataclass(frozen=True)
class MemoryShare:
    """Elements that a method keeps beside the model in the end, in the working precision."""

    device: int = 0
    """In the memory of each process's device."""
    host: int = 0
    """In the memory of each node's host."""


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a session's saved state, and how tensor parallelism shards it."""

    value: torch.Tensor
    """May be live. Of a sharded one, this rank's part."""
    like: str | None = None
    """Full name of the parameter that it is sharded like; None if all ranks have the same."""
    dim: int = 0
    """Dimension of the tensor that is sharded as the parameter's sharded dimension is."""


@dataclass(frozen=True)
class Adapter:
    """A projection as a dense weight and what is added to it: base + scale * lora_b @ lora_a."""

    base: torch.Tensor
    """(out, in), fp32."""
    lora_a: torch.Tensor
    """(r, in), fp32."""
    lora_b: torch.Tensor
    """(out, r), fp32."""
    scale: float
    """The same for all projections."""


@dataclass(frozen=True)
class Product:
    """A product of trained factors beside a frozen weight that is edited: s * left @ right."""

    weight: nn.Parameter
    """(out, in), frozen."""
    factors: tuple[nn.Parameter, ...]
    """`left` (out, r), `right` (r, in), and what `scale` takes besides."""
    scale: Callable[..., float | torch.Tensor]
    """s, given the values of the factors behind the first two."""


MethodT = TypeVar("MethodT", bound="Method[Any]")
ConfigT = TypeVar("ConfigT", bound=Section)


class Session(Generic[MethodT]):
    """A method at work on one live engine; the default does nothing.

    The hooks are called on every rank, in the same order, within `torch.no_grad`.

    Args:
        method: describes what the model is made of.
        state: the engine's partitioned state.
        model: the live model.
    """

    def __init__(self, method: MethodT, state: TrainState, model: nn.Module) -> None:
        self.method = method
        self.state = state
        self.model = model

    def before_step(self, step: int) -> Event | None:
        """Called after `step` completed updates, before the next forward pass."""
        return None

    def after_step(self, step: int) -> Event | None:
        """Called right after update number `step` (counted from 1) was applied."""
        return None

    def products_to_merge(self, step: int) -> Sequence[Product]:
        """Products of factors that the frozen weights are about to absorb in `after_step(step)`.

        Islands make the mean of these exact, and not only that of their factors.
        """
        return ()

    def report(self) -> Report:
        """Metrics for a line of the log; may wait for the device."""
        return Report()

    def replicas(self) -> dict[str, torch.Tensor]:
        """State of its own, by name, that must be the same on every rank at every moment."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot derive from the step number, the same for any number of copies
        of the model.

        Tensors are values of the dictionary itself, as `SavedTensor`; everything else is plain
        types. What rank 0 of every tensor-parallel part returns is saved.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, with plain tensors of this rank's parts."""


class Method(Generic[ConfigT]):
    """Full-rank training; a method is what it overrides.

    Args:
        config: the method's own configuration section.
        seed: the run's seed.
        steps: optimizer steps for which this method is in charge; `step` below counts within them.
        dtype: what the model computes in; it is initialised in fp32 and cast afterwards.
        stable_steps: updates before the learning rate begins its final decay; None where it falls
            from the warm-up on, or never.
        round_ending: updates that islands have trained apart when they meet after `step` of the
            method's updates; 0 where they do not meet. By default they always do.
    """

    requirements = Requirements()
    """What a run must offer; checked once, before anything is built."""
    has_dense_weight = True
    """Whether `dense_weight` has an answer. Without one a run ends without an export."""
    events_depend_on_steps = False
    """Whether what happens at a step depends on how many steps there are, beside the learning rate:
    a longer run is then another run from its first step on."""

    def __init__(
        self,
        config: ConfigT,
        seed: int,
        steps: int,
        dtype: torch.dtype = torch.float32,
        stable_steps: int | None = None,
        round_ending: Callable[[int], int] = lambda step: 1,
    ) -> None:
        self.config = config
        self.seed = seed
        self.steps = steps
        self.dtype = dtype
        self.stable_steps = stable_steps
        self.round_ending = round_ending

    def start(self, state: TrainState, model: nn.Module) -> Session[Any]:
        """The method at work on a live engine, before a state is restored or a step is taken."""
        return Session(self, state, model)

    def linear(self, spec: LinearSpec) -> Projection:
        """The module that stands in for a projection; its parameters are allocated, not drawn."""
        return DenseLinear(spec)

    def initialize(self, layer: Projection, dense: torch.Tensor) -> None:
        """Set a projection so that it starts from the dense weight (out, in), fp32.

        The weight is a random draw, a loaded checkpoint's or the warm start's; a method with
        factors derives them from it or lets the frozen weight absorb them. A method that is warm
        started sets `weight` to the dense weight plus a term that does not depend on it: where
        weights are sharded, it is called with zeros and slices of the dense weight are added.
        """
        assert isinstance(layer, DenseLinear)
        layer.weight.copy_(dense)

    def initialize_at_random(
        self, layer: Projection, draw: Callable[[], torch.Tensor], std: float
    ) -> None:
        """Set a projection at the start of a run that begins with random weights.

        A method overrides it where it need not see the dense weight to start from it.

        Args:
            draw: the dense weight (out, in), fp32: independent draws of N(0, std^2).
            std: their standard deviation.
        """
        self.initialize(layer, draw())

    def dense_weight(self, layer: Projection) -> torch.Tensor | None:
        """The dense weight (out, in) in fp32 that computes the same as the projection.

        Returns:
            None if no matrix does, as where a function stands between the factors;
            `has_dense_weight` is then false.
        """
        assert isinstance(layer, DenseLinear)
        return layer.weight.detach().float()

    def parts(self, layer: Projection) -> dict[str, torch.Tensor]:
        """Terms that the dense weight is the sum of, (out, in) in fp32, by name; by default one."""
        dense = self.dense_weight(layer)
        return {} if dense is None else {"weight": dense}

    def adapter(self, layer: Projection) -> Adapter | None:
        """The projection's frozen weight and its factors, apart.

        Returns:
            None if it has no such two parts.
        """
        return None

    def lay_out(self, layer: Projection) -> None:
        """Fill what a projection needs to know how it is sharded, where its parameters have no
        memory. For most of them the shapes say it all."""

    def parameter_groups(self, model: nn.Module) -> list[ParameterGroup]:
        """Trainable parameters by role and decay. Projections count as adapters.

        Parameters that tensor parallelism shards are in groups of their own: the flat tensors that
        ZeRO makes of a group must be sliced alike on all ranks that hold the same parameters.
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
        return len(tp_local_shape(parameter)) >= 2

    def matrix_optimizer(
        self, settings: OptimizerConfig, name: str, parameter: nn.Parameter
    ) -> MatrixOptimizer | None:
        """What updates a trained matrix; None leaves it to the element-wise `optimizer.name`.

        Matrices that one optimizer is to update together have equal ones.

        Args:
            settings: of the run.
            name: full name of the parameter.
            parameter: may be without memory.
        """
        return None

    def vector_axes(self, model: nn.Module) -> dict[nn.Parameter, int]:
        """Parameters whose vectors need an Adam step count of their own, with the vectors' axis."""
        return {}

    def edited_weights(self, model: nn.Module) -> list[nn.Parameter]:
        """Frozen weights that the method edits during training."""
        return []

    def memory_share(self, model: nn.Module) -> MemoryShare:
        """What a session keeps beside the model, at most. The model may be without memory."""
        return MemoryShare()

    def event_bytes(self, model: nn.Module, micro_batches: int) -> int:
        """The most that an event takes up on one process for as long as it lasts, in bytes.

        Weights, optimizer states and the activations of one micro-batch are not among them.

        Args:
            model: this process's part of it; may be without memory.
            micro_batches: of an update.
        """
        return 0

    def lr_multiplier(self, step: int, schedule: Schedule) -> float:
        """Factor on every learning rate for the update that follows `step` completed ones."""
        return schedule(step)


def pair_rule(settings: OptimizerConfig, name: str, scale: float = 1.0) -> SpectralPair | None:
    """What updates a factor of a projection, where the run asks for an optimizer of pairs.

    Args:
        settings: of the run.
        name: full name of a trained parameter.
        scale: of the product of both factors in the projection's weight.
    """
    if settings.adapter is None or name.rpartition(".")[2] not in PAIR:
        return None
    chosen = settings.spectral
    return SpectralPair(chosen.momentum, chosen.nesterov, chosen.normalized, scale)


def end_rule(settings: OptimizerConfig, name: str) -> Scale | None:
    """What updates the embedding and the head, which every method trains whole, where the run asks
    for SCALE.

    Args:
        settings: of the run.
        name: full name of a trained parameter.
    """
    if settings.matrix != "scale" or name not in (EMBEDDING, HEAD):
        return None
    return Scale(axis=0) if name == EMBEDDING else Scale(momentum=settings.scale.momentum)


def optimizer_groups(
    method: Method[Any], settings: OptimizerConfig, model: nn.Module
) -> list[ParameterGroup]:
    """The method's groups of parameters, those that mix both kinds of optimizers divided in two."""
    rules = matrix_rules(method, settings, model)
    found = []
    for group in method.parameter_groups(model):
        for ruled in (False, True):
            parameters = [p for p in group.parameters if (p in rules) is ruled]
            if parameters:
                in_pairs = ruled and rules[parameters[0]].needs == "pair"
                role = "pair" if in_pairs else group.role
                found.append(ParameterGroup(role, group.decays, parameters))
    return found


def projection_layers(model: nn.Module) -> dict[str, Projection]:
    """The modules that a method put in place of projections, by full name, in model order."""
    return {m.spec.name: m for m in model.modules() if isinstance(m, Projection)}


def matrix_rules(
    method: Method[Any], settings: OptimizerConfig, model: nn.Module
) -> dict[nn.Parameter, MatrixOptimizer]:
    """The matrix-wise optimizer of every trained parameter that has one, in the model's order.

    Equal ones are one object: what is asked of one object is computed together.
    """
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    chosen = (
        (p, method.matrix_optimizer(settings, name, p) or end_rule(settings, name))
        for name, p in trained
    )
    known: dict[MatrixOptimizer, MatrixOptimizer] = {}
    return {p: known.setdefault(rule, rule) for p, rule in chosen if rule is not None}
