"""Initial weights are a pure function; parameters and operations are counted exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from relora_ds.accounting.flops import flops_per_token, kind_of, parameter_counts
from relora_ds.config.model import ModelConfig
from relora_ds.model.init import InitialWeights, dense_shapes
from relora_ds.model.llama import Llama
from relora_ds.parallel.linear import DenseLinear, LinearSpec, Projection


def test_table_of_distributions(config):
    weights = InitialWeights(config, seed=5)
    for name, shape in dense_shapes(config).items():
        value = weights(name, shape)
        assert value.shape == shape
        assert value.dtype == torch.float32
        if name.endswith("norm.weight"):
            assert (value == 1).all()
        elif name.endswith(".bias"):
            assert (value == 0).all()
        else:
            bound = 5 / math.sqrt(value.numel())
            assert abs(value.mean()) < bound * config.initializer_range
            assert abs(value.std() / config.initializer_range - 1) < bound


def test_any_slice_is_the_same_draw(plain):
    weights = InitialWeights(plain, seed=5)
    name = "model.layers.1.mlp.up_proj.weight"
    whole = weights(name, (56, 32))
    assert torch.equal(weights.flat(name, 100, 700), whole.flatten()[100:800])
    assert torch.equal(InitialWeights(plain, seed=5)(name, (56, 32)), whole)
    assert not torch.equal(InitialWeights(plain, seed=6)(name, (56, 32)), whole)
    other = weights("model.layers.0.mlp.up_proj.weight", (56, 32))
    assert not torch.equal(other, whole)


def test_init_rejects_what_the_model_does_not_have(plain):
    weights = InitialWeights(plain, seed=5)
    with pytest.raises(KeyError, match="nowhere"):
        weights("nowhere", (1,))
    with pytest.raises(ValueError, match=r"has shape \(97, 32\), not \(32, 97\)"):
        weights("lm_head.weight", (32, 97))


PUBLISHED = {  # hidden, ffn, layers, heads, vocab -> all parameters, in projections
    "60m": ((512, 1376, 8, 8, 32000), 58_073_600, 25_296_896),
    "130m": ((768, 2048, 12, 12, 32000), 134_105_856, 84_934_656),
    "250m": ((768, 2560, 24, 16, 32100), 247_524_096, 198_180_864),
    "350m": ((1024, 2736, 24, 16, 32000), 367_969_280, 302_383_104),
    "1b": ((2048, 5461, 24, 32, 32000), 1_339_082_752, 1_207_910_400),
    "7b": ((4096, 11008, 32, 32, 32000), 6_738_415_616, 6_476_005_376),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_of_the_published_sizes(size):
    (hidden, ffn, layers, heads, vocab), total, projections = PUBLISHED[size]
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
    )
    with torch.device("meta"):
        counts = parameter_counts(Llama(config, DenseLinear))
    assert (counts.total, counts.trainable, counts.frozen) == (total, total, 0)
    assert counts.by_kind["attention"][0] + counts.by_kind["mlp"][0] == projections
    assert counts.by_kind["embedding"] == counts.by_kind["head"] == (vocab * hidden, 0)
    assert counts.by_kind["norm"] == ((2 * layers + 1) * hidden, 0)
    assert total == sum(math.prod(shape) for shape in dense_shapes(config).values())


class Factored(Projection):
    """A frozen matrix beside two trained factors, as an adapter would have."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(
            torch.empty(spec.out_features, spec.in_features), requires_grad=False
        )
        self.down = nn.Parameter(torch.empty(2, spec.in_features))
        self.up = nn.Parameter(torch.empty(spec.out_features, 2))


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_dense_model(plain, tied):
    config = plain.model_copy(update={"tie_word_embeddings": tied, "mlp_bias": True})
    model = Llama(config, DenseLinear)
    per_layer = 4 * 32 * 32 + 3 * 32 * 56
    head = 97 * 32
    scores = 12 * 32 * (20 + 1) / 2  # 2 products, 2 operations, 3 passes; mean of 1..20 positions
    assert flops_per_token(model, 20) == 6 * (2 * per_layer + head) + 2 * scores


def test_flops_and_counts_with_frozen_matrices(plain):
    with torch.device("meta"):
        model = Llama(plain, Factored)
    frozen = 2 * (4 * 32 * 32 + 3 * 32 * 56)
    factors = 2 * 2 * (4 * (32 + 32) + 3 * (32 + 56))
    head, norms = 97 * 32, 5 * 32
    assert flops_per_token(model, 1) == 4 * frozen + 6 * (factors + head) + 2 * 6 * 32 * 2
    counts = parameter_counts(model)
    assert counts.frozen == frozen
    assert counts.trainable == factors + 2 * head + norms
    assert sum(counts.by_kind["mlp"]) + sum(counts.by_kind["attention"]) == frozen + factors


def test_a_shared_weight_counts_once(plain):
    model = Llama(plain.model_copy(update={"tie_word_embeddings": True}), DenseLinear)
    counts = parameter_counts(model)
    assert "head" not in counts.by_kind
    assert counts.by_kind["embedding"] == (97 * 32, 0)


def test_an_unknown_parameter_has_no_kind():
    with pytest.raises(AssertionError, match=r"vision\.weight"):
        kind_of("vision.weight")
