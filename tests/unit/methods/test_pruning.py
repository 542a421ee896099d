"""Which moments survive a restart: the published rules, exact however the state is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from relora_ds.config.methods.relora import ResetConfig
from relora_ds.errors import DivergenceError
from relora_ds.methods.relora.pruning import reset_moments, reset_share
from relora_ds.methods.train_state import MomentShard
from relora_ds.numerics.order_statistic import order_statistics
from relora_ds.randomness import Stream
from tests.unit.fake_ranks import Sum, on_ranks
from tests.unit.methods.memory_state import MemoryMoments, MemoryState, StoredMoments

SHAPES = {"x.lora_A": (8, 50), "x.lora_B": (37, 8), "y.lora_A": (8, 11)}
MODES: list[dict[str, Any]] = [
    {"mode": "zero"},
    {"mode": "random", "fraction": 0.9},
    {"mode": "random", "fraction": 0.5, "joint": False},
    {"mode": "magnitude", "fraction": 0.9},
    {"mode": "magnitude", "fraction": 0.37, "joint": False},
    {"mode": "magnitude", "fraction": 0.0},
]
Parameters = dict[str, nn.Parameter]


def random_state(shapes: dict[str, tuple[int, ...]] = SHAPES) -> tuple[MemoryState, Parameters]:
    state, parameters = MemoryState(), {n: nn.Parameter(torch.empty(s)) for n, s in shapes.items()}
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters.values():
        first = torch.randn(parameter.shape, generator=generator)
        second = torch.randn(parameter.shape, generator=generator) ** 2
        state.stored[parameter] = StoredMoments(first, second)
    return state, parameters


def share_of(
    state: MemoryState, parameters: Parameters, config: ResetConfig, event: int = 1
) -> float:
    counts = reset_moments(state.moments, state.weights, parameters, config, 42, event)
    assert counts.shape == (2,)
    return reset_share(int(counts[0]), int(counts[1]), config)


def pruned(
    state: MemoryState, parameters: Parameters, event: int = 1, **settings: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What survives of either moment; what survives must be untouched."""
    before = {
        name: (state.stored[p].exp_avg.clone(), state.stored[p].exp_avg_sq.clone())
        for name, p in parameters.items()
    }
    config = ResetConfig(**settings)
    share = share_of(state, parameters, config, event)
    first, second, alive, left = {}, {}, 0, 0
    for name, parameter in parameters.items():
        stored = state.stored[parameter]
        first[name], second[name] = stored.exp_avg != 0, stored.exp_avg_sq != 0
        for now, old in zip((stored.exp_avg, stored.exp_avg_sq), before[name], strict=True):
            assert torch.equal(now[now != 0], old[now != 0])
            alive, left = alive + int((old != 0).sum()), left + int((now != 0).sum())
    assert share == pytest.approx((alive - left) / alive, abs=1e-12)
    return first, second


def kept(mask: torch.Tensor) -> int:
    return int(mask.sum())


def test_zero_keeps_nothing() -> None:
    for masks in pruned(*random_state()):
        assert not any(mask.any() for mask in masks.values())


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("joint", [True, False])
def test_random_keeps_the_share(fraction: float, joint: bool) -> None:
    size = 40_000
    state, parameters = random_state({"a": (200, 200)})
    first, second = pruned(state, parameters, mode="random", fraction=fraction, joint=joint)
    slack = 4 * math.sqrt(fraction * (1 - fraction) * size)
    for mask in (first["a"], second["a"]):
        assert abs(kept(mask) - (1 - fraction) * size) <= slack
    both = kept(first["a"] & second["a"])
    if joint:
        assert torch.equal(first["a"], second["a"])
    else:
        assert abs(both - (1 - fraction) ** 2 * size) <= slack + 4


@pytest.mark.parametrize("joint", [True, False])
def test_random_keeps_what_is_drawn_above_the_fraction(joint: bool) -> None:
    """And not what is drawn at it: the published rule is u > p, on a grid where both happen."""
    shape = 20, 20
    draws = Stream(42, "reset.exp_avg", "a", 1).uniform(0, 400).view(shape)
    at = float(draws[7, 3])
    state, parameters = random_state({"a": shape})
    first, _ = pruned(state, parameters, mode="random", fraction=at, joint=joint)
    assert torch.equal(first["a"], draws > at)
    assert not first["a"][7, 3]


def test_random_masks_depend_on_parameter_and_restart() -> None:
    masks = []
    for event in (1, 2):
        state, parameters = random_state({"a": (30, 30), "b": (30, 30)})
        first, second = pruned(state, parameters, event, mode="random", fraction=0.5, joint=False)
        masks += [*first.values(), *second.values()]
    assert torch.unique(torch.stack(masks).flatten(1), dim=0).shape[0] == 8


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.37, 0.5, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("joint", [True, False])
def test_magnitude_is_torch_quantile(fraction: float, joint: bool) -> None:
    state, parameters = random_state()
    expected: dict[str, list[torch.Tensor]] = {}
    for name, parameter in parameters.items():
        stored = state.stored[parameter]
        expected[name] = [
            m.abs() > torch.quantile(m.abs().double().flatten(), fraction)
            for m in (stored.exp_avg, stored.exp_avg_sq)
        ]
    first, second = pruned(state, parameters, mode="magnitude", fraction=fraction, joint=joint)
    for name, parameter in parameters.items():
        size = parameter.numel()
        for mask in expected[name]:
            assert abs(kept(mask) - (size - math.ceil(fraction * size))) <= 1
        if joint:
            assert torch.equal(first[name], second[name])
            assert torch.equal(first[name], expected[name][0] & expected[name][1])
        else:
            assert [first[name].tolist(), second[name].tolist()] == [
                mask.tolist() for mask in expected[name]
            ]


def test_ties_with_the_threshold_are_dropped() -> None:
    parameter = nn.Parameter(torch.empty(10))
    first = torch.tensor([1.0, -2.0, 2.0, -2.0, 2.0, 2.0, 3.0, -4.0, 5.0, 0.0])
    second = torch.arange(10.0)
    state = MemoryState({parameter: StoredMoments(first, second)})
    masks = pruned(state, {"a": parameter}, mode="magnitude", fraction=0.5, joint=False)
    assert first.tolist() == [0, 0, 0, 0, 0, 0, 3, -4, 5, 0]
    # the quantile 0.5 of 0 ... 9 is 4.5
    assert second.tolist() == [0, 0, 0, 0, 0, 5, 6, 7, 8, 9]
    assert kept(masks[0]["a"]) == 3


@pytest.mark.parametrize("joint", [True, False])
def test_equal_magnitudes_are_all_ties_and_zeros_stay(joint: bool) -> None:
    state, parameters = random_state({"equal": (4, 5), "zero": (4, 5), "usual": (4, 5)})
    equal, zero, usual = (state.stored[p] for p in parameters.values())
    equal.exp_avg.copy_(equal.exp_avg.sign() * 0.25)
    zero.exp_avg.zero_()
    zero.exp_avg_sq.zero_()
    first, second = pruned(state, parameters, mode="magnitude", fraction=0.5, joint=joint)
    assert kept(first["equal"]) == 0
    assert kept(second["equal"]) == (0 if joint else 10)
    assert kept(first["zero"]) == kept(second["zero"]) == 0
    assert 0 < kept(first["usual"]) <= 10
    assert usual.exp_avg.isfinite().all()


def test_mostly_zero_moments_lose_nothing_more() -> None:
    """With more than the fraction at zero already the threshold is zero."""
    state, parameters = random_state({"a": (10, 10)})
    moments = state.stored[parameters["a"]]
    moments.exp_avg.view(-1)[:95] = 0.0
    moments.exp_avg_sq.view(-1)[:95] = 0.0
    first, second = pruned(state, parameters, mode="magnitude", fraction=0.9)
    assert kept(first["a"]) == kept(second["a"]) == 5


def test_fraction_zero_drops_only_the_smallest() -> None:
    state, parameters = random_state({"a": (10, 10)})
    first, second = pruned(state, parameters, mode="magnitude", fraction=0.0, joint=False)
    assert kept(first["a"]) == kept(second["a"]) == 99


class ShardMoments(MemoryMoments):
    """One rank of several: elements [begin, end) of all moments laid end to end."""

    def __init__(
        self,
        stored: dict[nn.Parameter, StoredMoments],
        begin: int,
        end: int,
        sum_over_ranks: Sum,
    ) -> None:
        super().__init__(stored, [])
        self._begin, self._end = begin, end
        self._sum_over_ranks = sum_over_ranks

    def shard(self, parameter: nn.Parameter) -> MomentShard | None:
        offset = 0
        for other, stored in self.stored.items():
            size = other.numel()
            if other is parameter:
                start = min(max(self._begin - offset, 0), size)
                stop = min(max(self._end - offset, 0), size)
                first, second = stored.exp_avg.view(-1), stored.exp_avg_sq.view(-1)
                if start == stop:
                    return None
                return MomentShard(start, (first[start:stop], second[start:stop]))
            offset += size
        raise KeyError(parameter)

    def order_statistics(
        self, parameters: Sequence[nn.Parameter], ks: Sequence[int]
    ) -> list[tuple[torch.Tensor, ...]]:
        values = []
        for parameter in parameters:
            shard = self.shard(parameter)
            empty = torch.empty(0)
            values += [empty, empty] if shard is None else [shard.exp_avg, shard.exp_avg_sq]
        both = [k for k in ks for _ in range(2)]
        found = order_statistics(values, both, self._sum_over_ranks, torch.device("cpu"))
        return list(zip(found[::2], found[1::2], strict=True))

    def count_non_zero(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        total = super().count_non_zero(parameters)
        self._sum_over_ranks(total)
        return total


@pytest.mark.parametrize("settings", MODES, ids=str)
@pytest.mark.parametrize(
    "cuts", [(), (400,), (397,), (1,), (0,), (783,), (399, 400), (130, 700), (500, 500)], ids=str
)
def test_any_cut_gives_the_same_result(settings: dict[str, Any], cuts: tuple[int, ...]) -> None:
    whole, parameters = random_state()
    share = share_of(whole, parameters, ResetConfig(**settings))
    cut, shards = random_state()
    total = sum(parameter.numel() for parameter in shards.values())
    bounds = list(pairwise((0, *cuts, total)))

    def rank_part(rank: int, sum_over_ranks: Sum) -> float:
        begin, end = bounds[rank]
        moments = ShardMoments(cut.stored, begin, end, sum_over_ranks)
        config = ResetConfig(**settings)
        counts = reset_moments(moments, cut.weights, shards, config, 42, 1)
        return reset_share(int(counts[0]), int(counts[1]), config)

    assert on_ranks(len(bounds), rank_part) == [share] * len(bounds)
    for name, parameter in parameters.items():
        assert torch.equal(whole.stored[parameter].exp_avg, cut.stored[shards[name]].exp_avg)
        assert torch.equal(whole.stored[parameter].exp_avg_sq, cut.stored[shards[name]].exp_avg_sq)


def test_a_rule_that_resets_nothing_is_refused() -> None:
    """So many moments are zero already that none lies below the quantile."""
    state, parameters = random_state()
    for stored in state.stored.values():
        for moment in (stored.exp_avg, stored.exp_avg_sq):
            moment.view(-1)[: moment.numel() * 3 // 4] = 0.0
    config = ResetConfig(mode="magnitude", fraction=0.5)
    with pytest.raises(DivergenceError, match=r"reset none of \d+ moments .* 50\.00%"):
        share_of(state, parameters, config)


def test_a_rule_that_asks_for_nothing_may_reset_nothing() -> None:
    state, parameters = random_state()
    config = ResetConfig(mode="random", fraction=0.0)
    assert share_of(state, parameters, config) == 0.0
