"""The model equals transformers' LlamaForCausalLM; its options do not change the mathematics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from relora_ds.model.init import dense_shapes
from relora_ds.model.llama import Llama
from relora_ds.parallel.linear import DenseLinear, LinearSpec


def reference(config, model):
    """Transformers' model with the same weights."""
    transformers = pytest.importorskip("transformers")
    scaling = config.rope_scaling.model_dump(exclude_none=True) if config.rope_scaling else {}
    hf_config = transformers.LlamaConfig(
        **config.model_dump(exclude={"rope_theta", "rope_scaling"}),
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta, **scaling},
        attn_implementation="eager",
    )
    theirs = transformers.LlamaForCausalLM(hf_config)
    problems = theirs.load_state_dict(dict(model.named_parameters()), strict=False)
    assert not problems.unexpected_keys
    assert problems.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    return theirs


def test_logits_and_gradients_equal_transformers(config, build, tokens):
    model = build(config)
    theirs = reference(config, model)
    expected = theirs(input_ids=tokens[:, :-1], use_cache=False).logits
    torch.testing.assert_close(model.logits(tokens[:, :-1]), expected, atol=1e-5, rtol=1e-5)

    loss = model(tokens)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected_loss, atol=0, rtol=1e-6)
    loss.backward()
    expected_loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4, msg=name)


def test_names_and_shapes_are_those_of_hugging_face(config, build):
    model = build(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == dense_shapes(config)
    assert list(shapes) == list(dense_shapes(config))
    theirs = {name: tuple(p.shape) for name, p in reference(config, model).named_parameters()}
    assert shapes == theirs


def test_every_projection_comes_from_the_factory(plain):
    specs: list[LinearSpec] = []

    def factory(spec: LinearSpec) -> DenseLinear:
        specs.append(spec)
        return DenseLinear(spec)

    model = Llama(plain, factory)
    assert len(specs) == 7 * plain.num_hidden_layers
    for spec in specs:
        assert model.get_submodule(spec.name).spec is spec
        row = spec.name.endswith(("o_proj", "down_proj"))
        assert spec.style == ("row" if row else "column")


@pytest.mark.parametrize("frozen", [False, True])
def test_activation_checkpointing_changes_no_gradient(plain, build, frozen):
    tokens = torch.arange(34).view(2, 17)
    gradients = []
    for recompute in (False, True):
        model = build(plain, activation_checkpointing=recompute).train()
        model.model.embed_tokens.weight.requires_grad_(not frozen)
        loss = model(tokens)
        loss.backward()
        gradients.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_activation_checkpointing_recomputes_only_while_training(plain, build, monkeypatch):
    model = build(plain, activation_checkpointing=True)
    calls = []
    monkeypatch.setattr(
        "relora_ds.model.llama.checkpoint",
        lambda layer, *args, **options: calls.append(options) or layer(*args),
    )
    tokens = torch.arange(10).view(1, 10)
    model.eval()(tokens)
    with torch.no_grad():
        model.train()(tokens)
    assert not calls
    model(tokens)
    assert len(calls) == plain.num_hidden_layers


def test_masked_sum_counts_only_kept_rows(config, build, tokens):
    model = build(config)
    kept = torch.tensor([True, False, True])
    total, count = model.token_losses_sum(tokens, kept)
    assert total.dtype == torch.float64
    assert count.item() == 2 * 17
    assert not total.requires_grad
    torch.testing.assert_close(
        total / count, model(tokens[kept]).double().detach(), rtol=1e-6, atol=0
    )
    total, count = model.token_losses_sum(tokens)
    assert count.item() == 3 * 17
    torch.testing.assert_close(total / count, model(tokens).double().detach(), rtol=1e-6, atol=0)
    total, count = model.token_losses_sum(tokens, torch.zeros(3, dtype=torch.bool))
    assert (total.item(), count.item()) == (0, 0)


def test_causal(plain, build):
    model = build(plain)
    ids = torch.arange(12).view(1, 12)
    changed = ids.clone()
    changed[0, 7] = 90
    before, after = model.logits(ids), model.logits(changed)
    assert torch.equal(before[0, :7], after[0, :7])
    assert not torch.allclose(before[0, 7:], after[0, 7:], atol=1e-3)


def test_built_on_meta_and_materialised(config, tokens):
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        model = Llama(config, DenseLinear)
    assert all(p.is_meta for p in model.parameters())
    assert model(tokens.to("meta")).shape == ()
    model.to_empty(device="cpu")
    assert [name for name, _ in model.named_parameters()] == list(dense_shapes(config))
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert (head is embedding) == config.tie_word_embeddings
    assert torch.equal(torch.random.get_rng_state(), state)


def test_bfloat16_is_close_to_fp32(config, build, tokens):
    model = build(config)
    half = copy.deepcopy(model).bfloat16()
    assert half.logits(tokens).dtype == torch.bfloat16
    loss = half(tokens)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(tokens), rtol=2e-2, atol=0)
    loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in half.parameters())
