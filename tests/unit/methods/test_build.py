"""From dense weights to every method's model and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from relora_ds.config.methods.catalogue import MethodConfig
from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.errors import CheckpointError
from relora_ds.methods.build import build_model, dense_weights, filled_model, marks, meta_model
from relora_ds.methods.interface import Method, projection_layers
from relora_ds.methods.registry import METHODS
from relora_ds.model.init import dense_shapes
from relora_ds.model.llama import Llama
from relora_ds.numerics import draws
from relora_ds.parallel.linear import DenseLinear
from relora_ds.randomness import Stream

CPU = torch.device("cpu")
TRAIN = TrainConfig(steps=10, seq_length=8, micro_batch_size=1, global_batch_size=1)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied_biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": 4},
    "lora_balanced": {"name": "lora", "rank": 4, "init": "balanced"},
    "lora_trainable": {
        "name": "lora",
        "rank": 4,
        "init": "balanced",
        "trainable_scaling": True,
    },
    "relora": {"name": "relora", "rank": 4},
    "low_rank": {"name": "low_rank", "rank": 4},
    "low_rank_xavier": {"name": "low_rank", "rank": 4, "init": "xavier"},
    "sltrain": {"name": "sltrain", "rank": 4, "sparsity": 0.1},
    "switchlora": {"name": "switchlora", "rank": 3},
    "galore": {"name": "galore", "rank": 4},
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=16,
        **ARCHITECTURES[request.param],
    )


@pytest.fixture(params=SETTINGS)
def method(request: pytest.FixtureRequest) -> Method[Any]:
    config = TypeAdapter(MethodConfig).validate_python(SETTINGS[request.param])
    return METHODS[config.name](config, 42, 10)


def is_lossy(method: Method[Any]) -> bool:
    return method.config.name in ("low_rank", "sltrain")


def dense_values(architecture: ModelConfig) -> dict[str, torch.Tensor]:
    """A value for every parameter; biases and norms differ from their defaults."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: 0.3 * torch.randn(shape, generator=generator)
        for name, shape in dense_shapes(architecture).items()
    }


def build(architecture: ModelConfig, method: Method[Any], **options: Any) -> Llama:
    values = dense_values(architecture)

    def source(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        assert tuple(values[name].shape) == shape
        return values[name]

    return build_model(architecture, method, TRAIN, source, CPU, **options)


def parameters_of(model: Llama) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def dense_model(architecture: ModelConfig, weights: dict[str, torch.Tensor]) -> Llama:
    model = Llama(architecture, DenseLinear)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


def test_every_registered_method_is_covered() -> None:
    assert {settings["name"] for settings in SETTINGS.values()} == METHODS.keys()


def test_round_trip(architecture: ModelConfig, method: Method[Any]) -> None:
    model = build(architecture, method)
    weights = dict(dense_weights(architecture, method, TRAIN, parameters_of(model)))
    expected = dense_values(architecture)
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert value.dtype == torch.float32
        assert not value.requires_grad
        if not (is_lossy(method) and name.endswith("_proj.weight")):
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_the_dense_model_computes_what_the_methods_model_does(
    architecture: ModelConfig, method: Method[Any]
) -> None:
    model = build(architecture, method)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():  # as if trained
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    weights = dict(dense_weights(architecture, method, TRAIN, parameters_of(model)))
    tokens = torch.randint(31, (2, 8), generator=generator)
    expected = dense_model(architecture, weights).logits(tokens)
    torch.testing.assert_close(model.logits(tokens), expected, rtol=1e-4, atol=1e-5)


def test_a_built_model_is_complete(architecture: ModelConfig, method: Method[Any]) -> None:
    model = build(architecture, method)
    values = parameters_of(model)
    assert all(value.dtype == torch.float32 for value in values.values())
    assert all(value.isfinite().all() and value.device == CPU for value in values.values())
    tied = architecture.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert ("lm_head.weight" in values) is not tied
    like = meta_model(architecture, method, TRAIN)
    for (name, parameter), (other, placeholder) in zip(
        model.named_parameters(), like.named_parameters(), strict=True
    ):
        assert name == other
        assert parameter.requires_grad == placeholder.requires_grad, name
        assert parameter.shape == placeholder.shape, name


def test_projections_know_their_full_names(architecture: ModelConfig, method: Method[Any]) -> None:
    model = meta_model(architecture, method, TRAIN)
    modules = dict(model.named_modules())
    layers = projection_layers(model)
    assert len(layers) == 7 * architecture.num_hidden_layers
    assert all(modules[name] is layer for name, layer in layers.items())
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_cut_sees_every_parameter_once_and_filled(
    architecture: ModelConfig, method: Method[Any]
) -> None:
    expected = parameters_of(build(architecture, method))
    seen: dict[str, torch.Tensor] = {}

    def cut(name: str, parameter: torch.Tensor) -> None:
        assert name not in seen
        seen[name] = parameter.detach().clone()
        parameter.data = torch.empty(0)

    build(architecture, method, cut=cut)
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], value) for name, value in expected.items())


def test_weights_of_another_model_are_refused(
    architecture: ModelConfig, method: Method[Any]
) -> None:
    values = parameters_of(build(architecture, method))
    name = next(name for name in values if "down_proj" in name)
    broken = {
        "missing": {k: v for k, v in values.items() if k != name},
        "unexpected": values | {"model.extra.weight": torch.zeros(1)},
        "shape": values | {name: values[name][..., :-1]},
        "empty": {},
    }
    for weights in broken.values():
        with pytest.raises(CheckpointError, match=r"down_proj|extra|embed_tokens"):
            dict(dense_weights(architecture, method, TRAIN, weights))


def test_a_state_dict_lists_a_tied_head_twice(
    architecture: ModelConfig, method: Method[Any]
) -> None:
    model = build(architecture, method)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert "lm_head.weight" in state
    weights = dict(dense_weights(architecture, method, TRAIN, state))
    assert weights.keys() == dense_shapes(architecture).keys()


def test_weights_are_read_one_by_one(architecture: ModelConfig, method: Method[Any]) -> None:
    values, read = parameters_of(build(architecture, method)), []

    class Watched(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            read.append(name)
            return super().__getitem__(name)

    weights = dense_weights(architecture, method, TRAIN, Watched(values))
    assert not read
    for name, value in weights.items():
        layer = name.removesuffix("weight")
        assert all(asked == name or asked.startswith(layer) for asked in read)
        assert not value.requires_grad
        read.clear()


def test_weights_may_be_bf16(architecture: ModelConfig, method: Method[Any]) -> None:
    values = parameters_of(build(architecture, method))
    rounded = {name: value.bfloat16() for name, value in values.items()}
    for name, value in dense_weights(architecture, method, TRAIN, rounded).items():
        assert value.dtype == torch.float32
        if name in rounded and "_proj" not in name:
            assert torch.equal(value, rounded[name].float())


def test_a_model_that_awaits_its_state_draws_no_value(
    architecture: ModelConfig, method: Method[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(architecture, method)

    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError("a value was drawn")

    for place, name in ((draws, "_draw"), (Stream, "_words_at")):
        monkeypatch.setattr(place, name, refuse)
    model = filled_model(architecture, method, TRAIN, marks, CPU)
    values = parameters_of(model)
    assert {n: v.shape for n, v in values.items()} == {
        n: v.shape for n, v in parameters_of(built).items()
    }
    # what a layout is verified with: exact in bf16, no two neighbours alike, no two parameters
    for value in values.values():
        assert torch.equal(value.bfloat16().float(), value)
        flat = value.flatten()
        assert bool((flat[1:] != flat[:-1]).all())
    assert len({float(value.flatten()[0]) for value in values.values()}) > 0.8 * len(values)
    # the structure is there: where the sparse values lie follows from the seed
    for (name, found), (other, expected) in zip(
        model.named_buffers(), built.named_buffers(), strict=True
    ):
        assert name == other
        assert torch.equal(found, expected)
