"""What torch's compiler makes of a layer computes what plain operations do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from relora_ds.config.model import ModelConfig
from relora_ds.errors import ConfigError
from relora_ds.model import llama, mlp, norm, rope
from relora_ds.model.attention import Attention
from relora_ds.numerics import compiled
from relora_ds.parallel.linear import DenseLinear

CPU = torch.device("cpu")
GROUPED = ModelConfig(
    vocab_size=61,
    hidden_size=40,
    intermediate_size=92,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=64,
)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Functions that were to be compiled run as they are written; their names, call by call."""
    names: list[str] = []

    def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            names.append(function.__name__)
            return function.__wrapped__(*args)  # pyright: ignore[reportFunctionMemberAccess]

        return call

    monkeypatch.setattr(norm, "_norm", plainly(norm._norm))
    monkeypatch.setattr(norm, "_add_and_norm", plainly(norm._add_and_norm))
    monkeypatch.setattr(mlp, "_swiglu", plainly(mlp._swiglu))
    monkeypatch.setattr("relora_ds.model.attention.rotate_compiled", plainly(rope.rotate_compiled))
    return names


def _model(dtype: torch.dtype, recomputed: bool = False) -> llama.Llama:
    torch.manual_seed(3)
    model = llama.Llama(GROUPED, DenseLinear, activation_checkpointing=recomputed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def _pass(model: llama.Llama, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Loss and all gradients."""
    model.zero_grad()
    loss = model(tokens)
    loss.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return [loss.detach(), *(grad for grad in grads if grad is not None)]


def _assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], share: float) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        largest = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=share * largest)


SHARES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4e-2}
"""Difference over the largest element: rounding of each dtype, some tens of operations deep."""


@pytest.mark.parametrize("dtype", SHARES, ids=str)
@pytest.mark.parametrize("recomputed", [False, True])
def test_what_is_compiled_computes_the_same(
    traced: list[str], dtype: torch.dtype, recomputed: bool
) -> None:
    model = _model(dtype, recomputed)
    tokens = torch.arange(34).view(2, 17) % 61
    expected = _pass(model, tokens)
    assert not traced
    model.compile_layers()
    _assert_same(_pass(model, tokens), expected, SHARES[dtype])
    layers, times = GROUPED.num_hidden_layers, 2 if recomputed else 1
    assert traced.count("rotate_compiled") == 2 * layers * times
    assert traced.count("_add_and_norm") == traced.count("_swiglu") == layers * times
    assert traced.count("_norm") == layers * times + 1


def test_documents_are_rotated_by_their_own_positions(traced: list[str]) -> None:
    model = _model(torch.float64)
    model.separate_documents(5)
    tokens = torch.arange(34).view(2, 17) % 11
    expected = _pass(model, tokens)
    model.compile_layers()
    _assert_same(_pass(model, tokens), expected, 1e-13)
    assert "rotate_compiled" in traced


def test_evaluation_and_inference_stay_plain(traced: list[str]) -> None:
    """Their shapes differ from batch to batch, and each would be compiled."""
    model = _model(torch.float32)
    tokens = torch.arange(34).view(2, 17) % 61
    model.eval()
    before = model(tokens)
    model.compile_layers()
    assert torch.equal(model(tokens), before)
    assert not traced


def test_a_compiler_that_is_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import config as dynamo

    said = r"TORCHDYNAMO_DISABLE.*train\.compile"
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with dynamo.patch(disable=True), pytest.raises(ConfigError, match=said):
        compiled.check_compiler(CPU)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(ConfigError, match=said):
        compiled.check_compiler(CPU)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config as inductor

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    named = inductor.patch({"cpp.cxx": ("no-such-compiler",)})
    said = r"C\+\+ compiler: install g\+\+ .*train\.compile"
    with named, pytest.raises(ConfigError, match=said):
        compiled.check_compiler(CPU)


def compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's compiler at work; fails where nothing was compiled."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    compiled.check_compiler(CPU)
    before = compiled_graphs()
    yield
    assert compiled_graphs() > before
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", SHARES, ids=str)
def test_compiled_kernels_compute_the_same(dtype: torch.dtype) -> None:
    model = _model(dtype)
    tokens = torch.arange(34).view(2, 17) % 61
    expected = _pass(model, tokens)
    model.compile_layers()
    found = _pass(model, tokens)
    _assert_same(found, expected, SHARES[dtype])
    again = _pass(model, tokens)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_compiled_layer_keeps_no_more_than_a_plain_one() -> None:
    """Bytes that autograd keeps between the passes, counted tensor by tensor."""
    model = _model(torch.float32)
    tokens = torch.arange(66).view(2, 33) % 61

    def kept() -> int:
        storages: dict[int, int] = {}
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(tokens)
        loss.backward()
        return sum(storages.values())

    plain = kept()
    model.compile_layers()
    kept()  # compiles
    assert kept() <= plain


def test_every_part_of_a_layer_takes_part() -> None:
    model = _model(torch.float32)
    model.compile_layers()
    found = {type(m) for m in model.modules() if getattr(m, "compiled", False)}
    assert found == {norm.RMSNorm, norm.AddAndNorm, Attention, mlp.MLP}
