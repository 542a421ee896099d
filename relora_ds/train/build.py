"""From a method and a source of dense weights to a model, and back to dense weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import TrainConfig
from relora_ds.errors import CheckpointError
from relora_ds.methods.interface import Method, projection_layers
from relora_ds.model.embedding import VocabularyPart
from relora_ds.model.llama import Llama
from relora_ds.parallel.linear import Projection
from relora_ds.parallel.shape import TensorShard, shard_of
from relora_ds.parallel.tensor import SINGLE, TensorParallel

DenseSource = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Value of a parameter of the dense model: (name, shape) -> fp32 tensor on any device."""

Cut = Callable[[str, nn.Parameter], None]
"""What leaves a process with its own part of a parameter: (name, filled parameter)."""


def meta_model(
    architecture: ModelConfig,
    method: Method[Any],
    train: TrainConfig,
    tensor: TensorParallel = SINGLE,
) -> Llama:
    """The model's structure without memory, every parameter whole."""
    settings = (train.attention, train.activation_checkpointing, tensor)
    with torch.device("meta"):
        return Llama(architecture, method.linear, *settings)


def cut_over_ranks(module: nn.Module) -> None:
    """Leave this tensor-parallel rank's part of a module whose own parameters are filled."""
    if isinstance(module, Projection | VocabularyPart):
        module.cut_over_ranks()


def tensor_shards(
    architecture: ModelConfig, method: Method[Any], train: TrainConfig, rank: int, size: int
) -> dict[str, TensorShard]:
    """Which part of every parameter that is cut a tensor-parallel rank holds, by name."""
    model = meta_model(architecture, method, train, TensorParallel(rank, size))
    for module in model.modules():
        if isinstance(module, Projection):
            method.lay_out(module)
        cut_over_ranks(module)
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
    tensor: TensorParallel = SINGLE,
) -> Llama:
    """A model in fp32 on `device`, every parameter set from the dense weights.

    It grows module by module: where it is cut, no more than one projection is whole at a time. A
    parameter has its value before it is cut, so that no draw depends on how.

    Args:
        source: dense weights: an initial draw, a loaded model, or the end of a warm start.
        cut: called with every parameter as soon as it has its value; may replace its data. Under
            tensor parallelism it gets this rank's part.
        tensor: processes that share the model.
    """
    model = meta_model(architecture, method, train, tensor)
    projections = projection_layers(model)
    outside = {id(parameter): name for name, parameter in _outside_of(model, projections)}
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        fresh = _allocate(module, name, device, made)
        for _, parameter, placeholder in fresh:
            if placeholder in outside:
                value = source(outside[placeholder], tuple(parameter.shape))
                parameter.copy_(value)
        if isinstance(module, Projection):
            spec = module.spec
            dense = source(f"{name}.weight", (spec.out_features, spec.in_features))
            method.initialize(module, dense.to(device, torch.float32))
        if tensor.size > 1:
            cut_over_ranks(module)
        if cut is not None:
            for full_name, parameter, _ in fresh:
                cut(full_name, parameter)
    return model


def _allocate(
    module: nn.Module, name: str, device: torch.device, made: dict[int, nn.Parameter]
) -> list[tuple[str, nn.Parameter, int]]:
    """Give the parameters of this very module memory; one that is shared gets it once.

    Returns:
        Full name, parameter and identity of its placeholder, of those that are new.
    """
    fresh = []
    for key, placeholder in list(module.named_parameters(recurse=False)):
        parameter = made.get(id(placeholder))
        if parameter is None:
            empty = torch.empty_like(placeholder, device=device)
            parameter = nn.Parameter(empty, requires_grad=placeholder.requires_grad)
            made[id(placeholder)] = parameter
            fresh.append((f"{name}.{key}", parameter, id(placeholder)))
        setattr(module, key, parameter)
    return fresh


@torch.no_grad()  # as a decorator: a `with` around a yield would leak into the caller
def dense_weights(
    architecture: ModelConfig,
    method: Method[Any],
    train: TrainConfig,
    values: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of the dense model that computes what the method's model does, in fp32.

    Args:
        values: value of every parameter of the method's model, by name, on the CPU.

    Raises:
        CheckpointError: `values` are of another model.

    Yields:
        (name, tensor) in Hugging Face's names, one at a time.
    """
    model = meta_model(architecture, method, train)
    _assign(model, values)
    projections = projection_layers(model)
    for name, layer in projections.items():
        yield f"{name}.weight", method.dense_weight(layer)
    for name, parameter in _outside_of(model, projections):
        yield name, parameter.detach().float()


def _assign(model: Llama, values: Mapping[str, torch.Tensor]) -> None:
    """Make `values` the parameters of a model without memory, without copying them."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    missing = [name for name in shapes if name not in values]
    # a tied head is listed once among the parameters and twice in a state dict
    unexpected = sorted(values.keys() - model.state_dict().keys())
    reshaped = [n for n in shapes if n in values and values[n].shape != shapes[n]]
    if missing or unexpected or reshaped:
        raise CheckpointError(
            f"the weights are not those of this model: missing {missing[:3]}, unexpected "
            f"{unexpected[:3]}, of another shape {reshaped[:3]}; use the configuration that they "
            "were saved with"
        )
    model.load_state_dict(dict(values), strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


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
