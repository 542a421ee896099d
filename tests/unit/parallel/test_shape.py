"""What tensor parallelism leaves to a rank, put together again, is the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from relora_ds.config.methods.sltrain import SLTrainConfig
from relora_ds.methods.sltrain.sltrain import SLTrain, SparseLowRankLinear
from relora_ds.parallel.linear import DenseLinear, LinearSpec
from relora_ds.parallel.shape import TPShard, apply_shard, global_shape, shard_of, tp_local_shape
from relora_ds.parallel.tensor import SINGLE, TensorParallel
from relora_ds.randomness import Stream


@pytest.mark.parametrize("length", [0, 1, 5, 8, 5461, 32001])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_spans_cover_a_dimension_evenly(length: int, size: int) -> None:
    spans = [TensorParallel(rank, size).span(length) for rank in range(size)]
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == length
    lengths = [stop - start for start, stop in spans]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(5, 7), (6, 4, 3)])
@pytest.mark.parametrize("scattered", [False, True])
def test_parts_make_the_whole(dim: int, shape: tuple[int, ...], scattered: bool) -> None:
    value = torch.randn(shape)
    joined, flat = torch.zeros(shape), torch.zeros(value.numel())
    for rank in range(3):
        index: range | torch.Tensor = range(*TensorParallel(rank, 3).span(shape[dim]))
        if scattered:
            index = torch.arange(rank, shape[dim], 3)
        shard = TPShard(value.shape, dim, index)
        part = shard.part(value)
        shard.place(part, joined)
        # any stretch of the flattened part, as ZeRO cuts it
        start, count = 1, part.numel() - 2
        positions = shard.flat_index(start, count)
        assert torch.equal(value.view(-1)[positions], part.reshape(-1)[start : start + count])
        flat[shard.flat_index(0, part.numel())] = part.reshape(-1)
    assert torch.equal(joined, value)
    assert torch.equal(flat.view(shape), value)


def test_a_cut_parameter_knows_both_shapes() -> None:
    parameter = nn.Parameter(torch.randn(5, 4))
    original = parameter.detach().clone()
    assert global_shape(parameter) == tp_local_shape(parameter) == (5, 4)
    apply_shard(parameter, TPShard(parameter.shape, 0, range(3, 5)))
    assert torch.equal(parameter, original[3:])
    assert (global_shape(parameter), tp_local_shape(parameter)) == ((5, 4), (2, 4))
    assert getattr(parameter, "tensor_model_parallel", False)
    assert shard_of(parameter) is not None


@pytest.mark.parametrize("style", ["column", "row"])
def test_a_cut_dense_projection_has_its_part_of_weight_and_bias(style: str) -> None:
    tp = TensorParallel(1, 2)
    layer = DenseLinear(LinearSpec("p", 6, 5, True, style, tp))  # type: ignore[arg-type]
    weight = layer.weight.detach().clone()
    layer.shard_over_ranks()
    assert torch.equal(layer.weight, weight[3:] if style == "column" else weight[:, 3:])
    assert layer.bias is not None
    assert len(layer.bias) == (2 if style == "column" else 5)


@pytest.mark.parametrize("style", ["column", "row"])
@pytest.mark.parametrize("size", [2, 3])
def test_parts_of_a_sparse_projection_are_parts_of_its_weight(style: str, size: int) -> None:
    method = SLTrain(SLTrainConfig(name="sltrain", rank=2, sparsity=0.2), seed=3, steps=1)

    def layer(tp: TensorParallel) -> SparseLowRankLinear:
        spec = LinearSpec("p", 11, 9, False, style, tp)  # type: ignore[arg-type]
        made = method.linear(spec)
        assert isinstance(made, SparseLowRankLinear)
        with torch.no_grad():
            method.initialize(made, torch.zeros(9, 11))
            made.lora_B.copy_(torch.arange(18.0).view(9, 2))
        return made

    whole = method.dense_weight(layer(SINGLE))
    joined = torch.zeros_like(whole)
    count = 0
    for rank in range(size):
        part = layer(TensorParallel(rank, size, plan="fold"))
        dim = 0 if style == "column" else 1
        span = range(*part.spec.tp.span(whole.shape[dim]))
        part.shard_over_ranks()
        count += part.columns.numel()
        assert part.values.numel() == part.columns.numel() == int(part.row_starts[-1])
        TPShard(whole.shape, dim, span).place(method.dense_weight(part), joined)
    assert count == int(0.2 * 99)
    torch.testing.assert_close(joined, whole, rtol=0, atol=0)


def test_factors_are_cut_along_a_rank_that_divides() -> None:
    assert TensorParallel(0, 2).shards_inner(6)
    assert not TensorParallel(0, 2).shards_inner(5)
    assert not TensorParallel(0, 2, plan="fold").shards_inner(6)
    assert not SINGLE.shards_inner(6)


def test_a_draw_by_index_is_the_draw() -> None:
    stream = Stream(1, "test")
    index = torch.tensor([[5, 0], [99, 7]])
    assert torch.equal(stream.uniform_at(index), stream.uniform(0, 100)[index])
