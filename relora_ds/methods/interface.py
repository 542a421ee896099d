"""The one seam between training methods and everything else.

`Method` is what a method overrides; its defaults are full-rank training. `TrainState`, beside it in
`train_state`, is all that a method may touch of a running engine. A method never sees an optimizer,
a partition or a stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from relora_ds.config.base import Section
from relora_ds.methods.schedule import Schedule
from relora_ds.methods.train_state import TrainState
from relora_ds.parallel.linear import DenseLinear, LinearSpec, Projection
from relora_ds.parallel.shape import TPShard, shard_of, tp_local_shape


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
        return len(tp_local_shape(parameter)) >= 2

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
        self, states: Sequence[dict[str, Any]], shards: Sequence[Mapping[str, TPShard]]
    ) -> dict[str, Any]:
        """The state for the whole model from what `state_dict` returned on tensor-parallel ranks.

        Args:
            states: with their tensors, one per rank.
            shards: which part of every cut parameter each rank holds.
        """
        return states[0]

    def part_of_state(self, state: dict[str, Any], shards: Mapping[str, TPShard]) -> dict[str, Any]:
        """A rank's part of the state for the whole model: the inverse of `join_states`."""
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; called on every rank after `attach`."""


def projection_layers(model: nn.Module) -> dict[str, Projection]:
    """The modules that a method put in place of projections, by full name, in model order."""
    return {m.spec.name: m for m in model.modules() if isinstance(m, Projection)}
