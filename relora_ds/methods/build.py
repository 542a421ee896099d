"""From a method and a source of dense weights to a model, and back to dense weights."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.errors import CheckpointError
from relora_ds.methods.interface import Adapter, Method, projection_layers
from relora_ds.model.embedding import VocabularyPart
from relora_ds.model.llama import Llama
from relora_ds.parallel.linear import Projection
from relora_ds.parallel.shape import TPShard, shard_of
from relora_ds.parallel.tensor import SINGLE, TensorParallel

DenseSource = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Value of a parameter of the dense model: (name, shape) -> fp32 tensor on any device."""

_MARKS = 251  # a prime: no stride of a layout is a multiple of it

Cut = Callable[[str, nn.Parameter], None]
"""What leaves a process with its own part of a parameter: (name, filled parameter)."""


def meta_model(
    architecture: ModelConfig,
    method: Method[Any],
    train: TrainConfig,
    tp: TensorParallel = SINGLE,
) -> Llama:
    """The model's structure without memory, every parameter whole."""
    settings = (train.attention, train.activation_checkpointing, tp)
    with torch.device("meta"):
        return Llama(architecture, method.linear, *settings)


def shard_over_ranks(module: nn.Module) -> None:
    """Leave this tensor-parallel rank's part of a module whose own parameters are filled."""
    if isinstance(module, Projection | VocabularyPart):
        module.shard_over_ranks()


def sharded_meta_model(
    architecture: ModelConfig, method: Method[Any], train: TrainConfig, tp: TensorParallel
) -> Llama:
    """The structure without memory that a tensor-parallel rank is left with."""
    model = meta_model(architecture, method, train, tp)
    if tp.size > 1:
        for module in model.modules():
            if isinstance(module, Projection):
                method.lay_out(module)
            shard_over_ranks(module)
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to("meta"))  # what a layout was read from
    return model


def shards_of(model: nn.Module) -> dict[str, TPShard]:
    """Which part of every parameter that is cut the model's rank holds, by name."""
    every = model.named_parameters(remove_duplicate=False)
    found = {name: shard_of(parameter) for name, parameter in every}
    return {name: shard for name, shard in found.items() if shard is not None}


@torch.no_grad()
def build_model(
    architecture: ModelConfig,
    method: Method[Any],
    train: TrainConfig,
    source: DenseSource,
    device: torch.device,
    cut: Cut | None = None,
    tp: TensorParallel = SINGLE,
    random_std: float | None = None,
) -> Llama:
    """A model in fp32 on `device`, every parameter set from the dense weights.

    It grows module by module: where it is cut, no more than one projection is whole at a time. A
    parameter has its value before it is cut, so that no draw depends on how.

    Args:
        source: dense weights: an initial draw, a loaded model, or the end of a warm start.
        cut: called with every parameter as soon as it has its value; may replace its data. Under
            tensor parallelism it gets this rank's part.
        tp: processes that share the model.
        random_std: of the matrices, where the source draws them at random; None where it does not.
    """
    model = meta_model(architecture, method, train, tp)
    projections = projection_layers(model)
    outside = {id(parameter): name for name, parameter in _outside_of(model, projections)}

    def fill(name: str, module: nn.Module, fresh: _Fresh) -> None:
        for _, parameter, placeholder in fresh:
            if placeholder in outside:
                value = source(outside[placeholder], tuple(parameter.shape))
                parameter.copy_(value)
        if isinstance(module, Projection):
            shape = module.spec.out_features, module.spec.in_features

            def dense() -> torch.Tensor:
                return source(f"{name}.weight", shape).to(device, torch.float32)

            if random_std is None:
                method.initialize(module, dense())
            else:
                method.initialize_at_random(module, dense, random_std)

    return _grow(model, device, fill, cut, tp)


@torch.no_grad()
def filled_model(
    architecture: ModelConfig,
    method: Method[Any],
    train: TrainConfig,
    values: DenseSource,
    device: torch.device,
    cut: Cut | None = None,
    tp: TensorParallel = SINGLE,
) -> Llama:
    """The method's own model in fp32 on `device`, with given values of its parameters: nothing is
    drawn.

    Args:
        values: of every parameter of the method's model, whole, asked for one by one.
        cut: called with every parameter as soon as it has its value; may replace its data. Under
            tensor parallelism it gets this rank's part.
        tp: processes that share the model.
    """

    def fill(name: str, module: nn.Module, fresh: _Fresh) -> None:
        if isinstance(module, Projection):
            method.lay_out(module)
            for key, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, key, buffer.to(device))
        for full_name, parameter, _ in fresh:
            parameter.copy_(values(full_name, tuple(parameter.shape)))

    return _grow(meta_model(architecture, method, train, tp), device, fill, cut, tp)


def marks(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values for a parameter that is going to be restored: fp32 of its shape.

    They cost no draw, are exact in bf16, and differ from place to place and from parameter to
    parameter, so that a layout can be verified by value.
    """
    first, count = zlib.crc32(name.encode()), math.prod(shape)
    cycle = torch.arange(first, first + _MARKS).remainder_(_MARKS).float().div_(256.0)
    return cycle.repeat(-(-count // _MARKS))[:count].view(shape)


_Fresh = list[tuple[str, nn.Parameter, int]]
"""Full name, parameter and identity of its placeholder, of parameters that just got memory."""


def _grow(
    model: Llama,
    device: torch.device,
    fill: Callable[[str, nn.Module, _Fresh], None],
    cut: Cut | None,
    tp: TensorParallel,
) -> Llama:
    """Give a model without memory its parameters, module by module: allocated, filled, cut."""
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        fresh = _allocate(module, name, device, made)
        fill(name, module, fresh)
        if tp.size > 1:
            shard_over_ranks(module)
        if cut is not None:
            for full_name, parameter, _ in fresh:
                cut(full_name, parameter)
    return model


def _allocate(
    module: nn.Module, name: str, device: torch.device, made: dict[int, nn.Parameter]
) -> _Fresh:
    """Give the parameters of this very module memory; one that is shared gets it once.

    Returns:
        Those that are new.
    """
    fresh: _Fresh = []
    for key, placeholder in list(module.named_parameters(recurse=False)):
        parameter = made.get(id(placeholder))
        if parameter is None:
            empty = torch.empty_like(placeholder, device=device)
            parameter = nn.Parameter(empty, requires_grad=placeholder.requires_grad)
            made[id(placeholder)] = parameter
            fresh.append((f"{name}.{key}", parameter, id(placeholder)))
        setattr(module, key, parameter)
    return fresh


def dense_weights(
    architecture: ModelConfig,
    method: Method[Any],
    train: TrainConfig,
    values: Mapping[str, torch.Tensor],
) -> DenseWeights:
    """Every parameter of the dense model that computes what the method's model does, in fp32.

    Args:
        values: value of every parameter of the method's model, by name, on the CPU. They are asked
            for one by one, each when a dense weight that needs it is.

    Raises:
        CheckpointError: `values` are of another model.
    """
    return DenseWeights(meta_model(architecture, method, train), method, values)


class DenseWeights(Mapping[str, torch.Tensor]):
    """Dense weights by Hugging Face's names, each computed on access: fp32 on the CPU.

    Args:
        model: the method's, without memory.
    """

    def __init__(
        self, model: Llama, method: Method[Any], values: Mapping[str, torch.Tensor]
    ) -> None:
        self._method = method
        self._values = values
        projections = projection_layers(model)
        self._layers = {f"{name}.weight": layer for name, layer in projections.items()}
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._names = [*self._layers, *(name for name, _ in _outside_of(model, projections))]
        missing = [name for name in self._shapes if name not in values]
        # a tied head is listed once among the parameters and twice in a state dict
        unexpected = sorted(values.keys() - model.state_dict().keys())
        if missing or unexpected:
            raise CheckpointError(
                f"the weights are not those of this model: missing {missing[:3]}, unexpected "
                f"{unexpected[:3]}; use the configuration that they were saved with"
            )

    @torch.no_grad()
    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._layers:
            return self._value(name).float()
        dense = self._method.dense_weight(self.projection(name))
        if dense is None:
            raise CheckpointError(
                f"{name}: method {self._method.config.name} has no dense weight that computes the "
                "same: its checkpoints can be resumed and evaluated, but not exported"
            )
        return dense.detach()

    def is_projection(self, name: str) -> bool:
        """Whether a method's own module stands for this weight."""
        return name in self._layers

    @torch.no_grad()
    def adapter(self, name: str) -> Adapter:
        """The two parts of a projection's dense weight.

        Raises:
            CheckpointError: the method's projections are not made of a weight and an adapter.
        """
        found = self._method.adapter(self.projection(name))
        if found is None:
            raise CheckpointError(
                f"method {self._method.config.name} has no frozen weight with an adapter beside "
                "it: export the dense model instead"
            )
        return found

    @torch.no_grad()
    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """Terms that a projection's dense weight is the sum of, by name."""
        return self._method.parts(self.projection(name))

    def projection(self, name: str) -> Projection:
        """The method's module behind a dense weight, with its parameters."""
        layer = copy.deepcopy(self._layers[name])  # without memory, so that nothing stays behind
        prefix = name.removesuffix("weight")
        own = {key: self._value(prefix + key) for key, _ in layer.named_parameters()}
        layer.load_state_dict(own, strict=False, assign=True)
        return layer

    def _value(self, name: str) -> torch.Tensor:
        value = self._values[name].detach()
        if value.shape != self._shapes[name]:
            raise CheckpointError(
                f"the weights are not those of this model: {name} has the shape "
                f"{tuple(value.shape)} instead of {tuple(self._shapes[name])}; use the "
                "configuration that they were saved with"
            )
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _outside_of(
    model: nn.Module, projections: Mapping[str, Projection]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that are the same in every method: all but what stands in for a dense weight."""
    special = {
        id(parameter)
        for layer in projections.values()
        for name, parameter in layer.named_parameters()
        if name != "bias"
    }
    for name, parameter in model.named_parameters():
        if id(parameter) not in special:
            yield name, parameter
