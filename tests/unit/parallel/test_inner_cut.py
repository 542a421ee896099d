"""Factors cut along the rank dimension: shapes, names of vectors, what is exchanged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from relora_ds.accounting.footprints import footprint_of
from relora_ds.config.methods.low_rank import LowRankConfig
from relora_ds.config.methods.relora import ReLoRAConfig
from relora_ds.config.methods.sltrain import SLTrainConfig
from relora_ds.engine.zero.fragments import fragment_of
from relora_ds.engine.zero.vectors import lay_out_wire
from relora_ds.methods.adapter import draw_factors
from relora_ds.methods.interface import Method
from relora_ds.methods.low_rank import LowRank
from relora_ds.methods.relora.relora import ReLoRA
from relora_ds.methods.sltrain.sltrain import SLTrain
from relora_ds.optim.vector_clock import Stretch, VectorClock
from relora_ds.parallel.footprint import Exchange, UpdateSize
from relora_ds.parallel.linear import LinearSpec
from relora_ds.parallel.low_rank import LowRankProjection
from relora_ds.parallel.shape import global_shape, inner_shard, method_shape, tp_local_shape
from relora_ds.parallel.tensor import TensorParallel

RELORA = ReLoRAConfig(name="relora", rank=4, merge_every=10, restart_warmup_steps=1)
METHODS: dict[str, Method] = {
    "relora": ReLoRA(RELORA, seed=1, steps=9),
    "low_rank": LowRank(LowRankConfig(name="low_rank", rank=4), seed=1, steps=9),
    "sltrain": SLTrain(SLTrainConfig(name="sltrain", rank=4, sparsity=0.2), seed=1, steps=9),
}


def cut_layer(name: str, style: str, tp: TensorParallel) -> LowRankProjection:
    spec = LinearSpec("p", 6, 10, True, style, tp)  # type: ignore[arg-type]
    layer = METHODS[name].linear(spec)
    assert isinstance(layer, LowRankProjection)
    with torch.no_grad():
        METHODS[name].initialize(layer, torch.randn(10, 6))
    layer.shard_over_ranks()
    return layer


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("style", ["column", "row"])
def test_both_factors_are_cut_and_no_gradient_is_a_share(name: str, style: str) -> None:
    layer = cut_layer(name, style, TensorParallel(1, 2))
    column = style == "column"
    assert tp_local_shape(layer.lora_A) == ((2, 6) if column else (4, 3))
    assert tp_local_shape(layer.lora_B) == ((5, 4) if column else (10, 2))
    inner, other = (layer.lora_A, layer.lora_B) if column else (layer.lora_B, layer.lora_A)
    assert inner_shard(inner) is not None
    assert inner_shard(other) is None
    assert method_shape(inner) == global_shape(inner)
    assert method_shape(other) == tp_local_shape(other) != global_shape(other)
    assert layer.partial_gradients() == []


@pytest.mark.parametrize("tp", [TensorParallel(1, 2, plan="fold"), TensorParallel(1, 3)])
@pytest.mark.parametrize("name", METHODS)
def test_otherwise_one_factor_is_whole_and_its_gradient_a_share(
    name: str, tp: TensorParallel
) -> None:
    layer = cut_layer(name, "column", tp)
    assert tp_local_shape(layer.lora_A) == (4, 6)
    assert layer.partial_gradients() == [layer.lora_A]
    assert footprint_of(layer, UpdateSize(10, 2, formulation="split")).exchanges == ()


def test_a_row_bias_has_a_share_of_its_gradient_where_the_sequence_is_cut() -> None:
    layer = cut_layer("relora", "row", TensorParallel(1, 2, sequence=True))
    assert layer.partial_gradients() == [layer.bias]
    assert cut_layer("relora", "column", TensorParallel(1, 2, sequence=True)).bias is not None


def test_methods_draw_a_factor_whole_along_the_rank() -> None:
    layer = cut_layer("relora", "column", TensorParallel(1, 2))
    assert isinstance(METHODS["relora"], ReLoRA)
    lora_a, _ = draw_factors(layer, RELORA, 1, event=0)  # type: ignore[arg-type]
    assert lora_a.shape == (4, 6)
    torch.testing.assert_close(layer.lora_A.detach(), lora_a[2:], rtol=0, atol=0)


@pytest.mark.parametrize("style", ["column", "row"])
def test_vectors_of_a_cut_factor_go_by_their_full_numbers(style: str) -> None:
    layer = cut_layer("relora", style, TensorParallel(1, 2))
    factor, axis = (layer.lora_A, 0) if style == "column" else (layer.lora_B, 1)
    flat = factor.detach().clone().view(-1)
    fragment = fragment_of(factor, Stretch(0, 0, flat.numel()), VectorClock(4, axis))
    (part,) = fragment.parts(flat, fragment.find(torch.tensor([3, 0])))
    # vector 0 is the other rank's, vector 3 the second one here
    assert part.asked.tolist() == [0]
    expected = factor.detach()[1] if axis == 0 else factor.detach()[:, 1]
    torch.testing.assert_close(part.view[part.local][0], expected, rtol=0, atol=0)
    (block,) = fragment.blocks(flat)
    assert block.along(torch.arange(4), axis).flatten().tolist() == [2, 3]


def test_exchanges_are_counted_per_pass() -> None:
    layer = cut_layer("relora", "column", TensorParallel(0, 2))
    size = UpdateSize(tokens=10, micro_batches=3, formulation="split")
    there, back = footprint_of(layer, size).exchanges
    assert there == Exchange("all_gather", "forward", 3, 3 * 10 * 4)
    assert back == Exchange("reduce_scatter", "backward", 3, 3 * 10 * 4)
    layer.recomputed = True
    assert len(footprint_of(layer, size).exchanges) == 3
    each = replace(size, formulation="layer")
    factor = footprint_of(cut_layer("sltrain", "row", TensorParallel(0, 2)), each)
    assert [each.elements for each in factor.exchanges] == [3 * 40, 3 * 40, 3 * 40]


def test_matrices_that_are_summed_twice_lie_in_front() -> None:
    shapes = [(1, 2), (2, 2), (1, 1)]
    flat, front, parts = lay_out_wire(shapes, [False, True, False], torch.empty(0))
    assert [part.shape for part in parts] == shapes
    parts[1].fill_(1.0)
    assert (flat.numel(), front.tolist()) == (7, [1.0] * 4)
