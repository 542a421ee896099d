"""Where masters and moments are found, on flat tensors cut as ZeRO cuts them, without processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from relora_ds.config.methods.relora import ResetConfig
from relora_ds.engine.deepspeed.layouts import (
    Bf16Partitions,
    FlatPartitions,
    GradientLists,
    build_layout,
)
from relora_ds.engine.zero.layout import Layout, MasterCopies, WholeParameters
from relora_ds.engine.zero.moments import OptimizerSlices
from relora_ds.engine.zero.state import ZeroState
from relora_ds.engine.zero.tensor_gradients import FrozenGradients
from relora_ds.errors import ConfigError, ReloraError
from relora_ds.methods.relora.pruning import reset_moments, reset_share
from relora_ds.numerics.base_weight import Residual
from relora_ds.optim.vector_adamw import VectorAdamW
from relora_ds.optim.vector_clock import VectorClock
from relora_ds.parallel.shape import slice_of
from relora_ds.parallel.tensor import SINGLE
from tests.unit.fake_ranks import Sum, on_ranks

GROUPS = [[(3, 4), (5, 3), (2, 2)], [(7,), (1,)]]
"""Shapes of the parameters of each optimizer group."""


@dataclass
class FakeGroup:
    """What a layout asks of a process group."""

    rank: int
    sum: Sum = field(default=lambda tensor: None)


@pytest.fixture(autouse=True)
def _fake_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: group.rank)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: group.sum(tensor))


@dataclass
class FakeWrapper:
    """What a layout reads of DeepSpeed's wrappers of stages 1 and 2."""

    averaged_gradients: GradientLists = field(default_factory=dict)
    all_grad_tensors: GradientLists = field(default_factory=dict)


@dataclass
class FakeBf16Wrapper:
    """What a layout reads of DeepSpeed's wrapper of stage 1 with gradients in fp32."""

    fp32_groups_gradients_flat: list[torch.Tensor]
    fp32_groups_gradient_flat_partition: list[torch.Tensor]


@dataclass
class Cut:
    """One rank of a run at stage 1 or 2: two groups, each a flat tensor cut into equal slices."""

    size: int
    rank: int
    sum: Sum = field(default=lambda tensor: None)
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.parameters: list[list[nn.Parameter]] = []
        owners, self.masters = [], []
        for shapes in GROUPS:
            numels = [torch.Size(shape).numel() for shape in shapes]
            length = -(-sum(numels) // self.size) * self.size + self.size  # with padding
            working = torch.zeros(length, dtype=self.dtype)
            offset, group = 0, []
            for shape, numel in zip(shapes, numels, strict=True):
                # the parameters are views into the working buffer, as DeepSpeed leaves them
                view = working[offset : offset + numel].view(shape)
                view.copy_(torch.randn(shape, generator=generator))
                group.append(nn.Parameter(torch.empty(0)))
                group[-1].data = view
                offset += numel
            share = length // self.size
            owners.append(working[self.rank * share : (self.rank + 1) * share].float())
            self.parameters.append(group)
        self.optimizer = VectorAdamW([{"params": [owner]} for owner in owners])
        self.owners = owners
        self.group = FakeGroup(self.rank, self.sum)
        self.wrapper = FakeWrapper()

    def layout(self) -> Layout:
        group = cast(Any, self.group)
        return FlatPartitions(self.parameters, self.optimizer, group, self.wrapper)

    def step(self) -> None:
        """Moments that tell which element they belong to: value = position in the flat tensor."""
        for owner in self.owners:
            begin = self.rank * owner.numel()
            position = torch.arange(begin, begin + owner.numel(), dtype=torch.float32)
            self.optimizer.state[owner] = {
                "step": torch.tensor(1.0),
                "exp_avg": position.clone(),
                "exp_avg_sq": position * 2,
            }

    @property
    def flat(self) -> list[nn.Parameter]:
        return [parameter for group in self.parameters for parameter in group]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 30])
def test_flat_partitions_find_every_element_once(size: int) -> None:
    cuts = [Cut(size, rank) for rank in range(size)]
    layouts = [cut.layout() for cut in cuts]
    for cut in cuts:
        cut.step()
    for index, parameter in enumerate(cuts[0].flat):
        seen = torch.zeros(parameter.numel(), dtype=torch.int64)
        for cut, layout in zip(cuts, layouts, strict=True):
            mine = cut.flat[index]
            placement = layout.placements[mine]
            start, length = placement.stretch.start, placement.stretch.length
            seen[start : start + length] += 1
            expected = parameter.detach().view(-1)[start : start + length].float()
            assert torch.equal(placement.master(), expected)
            moment = layout.optimizer_state(mine, "exp_avg")
            assert (moment is None) == (length == 0)
            if moment is not None:
                first = mine.data.storage_offset() + start
                assert moment.tolist() == list(range(first, first + length))
        assert bool((seen == 1).all())


def test_before_the_first_step_there_are_no_moments() -> None:
    cut = Cut(2, 0)
    layout = cut.layout()
    assert layout.optimizer_state(cut.flat[0], "exp_avg") is None


def test_masters_and_moments_are_live() -> None:
    cut = Cut(2, 0)
    layout = cut.layout()
    cut.step()
    moment = layout.optimizer_state(cut.flat[0], "exp_avg")
    assert moment is not None
    moment.fill_(-1.0)
    layout.placements[cut.flat[0]].master().fill_(-2.0)
    assert cut.optimizer.state[cut.owners[0]]["exp_avg"][:12].tolist() == [-1.0] * 12
    assert cut.owners[0][:12].tolist() == [-2.0] * 12


def tiled(cut: Cut) -> list[list[torch.Tensor]]:
    """Gradients of a rank's slices, value = position in the flat tensor: tiles of uneven sizes,
    which end where the slice does, not where parameters do."""
    found = []
    for owner in cut.owners:
        begin = cut.rank * owner.numel()
        flat = torch.arange(begin, begin + owner.numel(), dtype=torch.float32)
        found.append(list(flat.split(max(1, owner.numel() // 3))))
    return found


def assert_gradients_are_found(cut: Cut, layout: Layout) -> None:
    """Each parameter's are the positions of its elements, and they are live."""
    for parameter in cut.flat:
        stretch = layout.placements[parameter].stretch
        first = parameter.data.storage_offset() + stretch.start
        pieces = list(layout.gradient(parameter))
        assert [float(x) for piece in pieces for x in piece] == list(
            range(first, first + stretch.length)
        )
        for piece in pieces:
            piece.fill_(-1.0)
        assert all(bool((piece == -1.0).all()) for piece in layout.gradient(parameter))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_gradients_are_found_where_they_tile_the_owner(size: int) -> None:
    for rank in range(size):
        cut = Cut(size, rank)
        layout = cut.layout()
        cut.wrapper.averaged_gradients.update(enumerate(tiled(cut)))
        assert_gradients_are_found(cut, layout)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_fp32_sums_of_gradients_are_found(size: int) -> None:
    for rank in range(size):
        cut = Cut(size, rank)
        parts = [torch.cat(tiles) for tiles in tiled(cut)]
        wrapper, group = FakeBf16Wrapper(parts, parts), cast(Any, cut.group)
        layout = Bf16Partitions(cut.parameters, cut.optimizer, group, wrapper)
        assert_gradients_are_found(cut, layout)
        assert [id(tensor) for tensor in layout.gradient_storages()] == list(map(id, parts))


def test_offloaded_gradients_are_found_beside_their_owners() -> None:
    cut = Cut(2, 1)
    layout = cut.layout()
    for owner, tiles in zip(cut.owners, tiled(cut), strict=True):
        owner.grad = torch.cat(tiles)
    assert_gradients_are_found(cut, layout)
    storages = [id(tensor) for tensor in layout.gradient_storages()]
    assert storages == [id(owner.grad) for owner in cut.owners]


def test_storages_of_gradients_are_sums_and_tiles_while_there_are_any() -> None:
    cut = Cut(2, 0)
    layout, (first, second) = cut.layout(), tiled(cut)
    cut.wrapper.averaged_gradients.update({0: first, 1: None})
    cut.wrapper.all_grad_tensors.update({0: None, 1: second})
    found = [id(tensor) for tensor in layout.gradient_storages()]
    assert found == [id(tensor) for tensor in (*first, *second)]
    with pytest.raises(AssertionError, match="outside of an update"):
        list(layout.gradient(cut.parameters[1][0]))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_layout_that_moved_is_an_error(rank: int) -> None:
    cut = Cut(2, rank)
    cut.owners[0].copy_(cut.owners[0].roll(1))
    with pytest.raises(ReloraError, match=r"master of a parameter of shape \(\d, \d\)"):
        cut.layout()


def test_full_master_is_put_together_from_the_ranks() -> None:
    def rank_part(rank: int, sum_over_ranks: Sum) -> list[torch.Tensor]:
        cut = Cut(3, rank, sum_over_ranks)
        layout = cut.layout()
        for owner in cut.owners:
            owner.add_(2.0**-20)  # below bf16
        return [layout.full_master(parameter) for parameter in cut.flat]

    whole = Cut(1, 0).flat
    for masters in on_ranks(3, rank_part):
        for master, parameter in zip(masters, whole, strict=True):
            assert torch.equal(master, parameter.detach().view(-1).float() + 2.0**-20)


def test_whole_parameters_and_master_copies() -> None:
    generator = torch.Generator().manual_seed(2)
    parameters = [nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(2)]
    optimizer = VectorAdamW([{"params": parameters}])
    layout = build_layout(optimizer, optimizer, [parameters], cast(Any, None))
    assert isinstance(layout, WholeParameters)
    assert layout.partition_group is None
    layout.placements[parameters[0]].master().zero_()
    assert not parameters[0].any()
    parameters[0].grad = torch.ones(3, 2)
    assert [piece.tolist() for piece in layout.gradient(parameters[0])] == [[1.0] * 6]
    assert next(iter(layout.gradient_storages())) is parameters[0].grad

    working = [nn.Parameter(p.detach().bfloat16()) for p in parameters]
    masters = [p.detach().float() for p in working]
    optimizer.param_groups[0]["params"] = masters
    wrapper = type("FP16_UnfusedOptimizer", (), {})()
    layout = build_layout(wrapper, optimizer, [working], cast(Any, None))
    assert isinstance(layout, MasterCopies)
    assert [p.owner for p in layout.placements.values()] == masters
    assert torch.equal(layout.full_master(working[1]), masters[1].view(-1))
    optimizer.param_groups[0]["params"] = masters[::-1]
    with pytest.raises(ReloraError, match="was not found"):
        build_layout(wrapper, optimizer, [working], cast(Any, None))


def test_an_unknown_wrapper_is_refused() -> None:
    wrapper, optimizer = type("ZenFlowZeroOptimizer", (), {})(), VectorAdamW([torch.zeros(1)])
    with pytest.raises(ConfigError, match="ZenFlowZeroOptimizer"):
        build_layout(wrapper, optimizer, [], cast(Any, None))


def state_of(cut: Cut, layout: Layout, done: int = 4) -> tuple[ZeroState, VectorClock]:
    """The port over one rank's cut; the first parameter has a clock, a frozen weight a store."""
    clock = VectorClock(3, axis=0)
    clocks = {cut.flat[0]: clock}
    slices = OptimizerSlices(layout, clocks, lambda: done)
    return ZeroState(slices, {}, lambda: None, no_gradients()), clock


def no_gradients() -> FrozenGradients:
    """The port of a run whose method asks for none."""
    return FrozenGradients(nn.Identity(), torch.device("cpu"), None, SINGLE)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 5])
def test_write_reaches_master_and_working_copy(size: int) -> None:
    for rank in range(size):
        cut = Cut(size, rank)
        layout = cut.layout()
        state, _ = state_of(cut, layout)
        before = [owner.clone() for owner in cut.owners]
        target = cut.flat[1]
        value = torch.arange(15.0).view(5, 3) + 2.0**-12
        state.weights.write(target, value)
        assert torch.equal(target.detach(), value.bfloat16())
        stretch = layout.placements[target].stretch
        expected = before[0]
        expected[stretch.offset : stretch.end] = value.view(-1)[
            stretch.start : stretch.start + stretch.length
        ]
        assert torch.equal(cut.owners[0], expected)
        assert torch.equal(cut.owners[1], before[1])
        with pytest.raises(AssertionError):
            state.weights.write(target, value.t())


def test_reset_steps_takes_the_optimizers_count() -> None:
    cut = Cut(2, 0)
    state, clock = state_of(cut, cut.layout(), done=4)
    assert state.moments.restart(cut.flat[0]) == 3
    assert clock.common_birth(4) == 4
    assert clock.ages(5).tolist() == [1, 1, 1]


@torch.no_grad()
def test_frozen_weights_are_edited_through_their_store() -> None:
    cut = Cut(1, 0)
    weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16), requires_grad=False)
    base = Residual(weight.data.view(-1), torch.full((12,), 1.0))
    slices = OptimizerSlices(cut.layout(), {}, lambda: 0)
    state = ZeroState(slices, {weight: base}, lambda: None, no_gradients())
    sums = state.weights.add_product(weight, torch.ones(4, 1), torch.full((1, 3), 2.0**-20), 1.0)
    assert sums is not None
    assert sums[0] == 12
    assert bool((weight == 1.0).all())
    assert bool((base.load(weight.data.view(-1), 0) == 1.0 + 2.0**-20).all())
    assert torch.equal(state.weights.totals([sums]), sums.unsqueeze(0))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("mode", ["zero", "random", "magnitude"])
def test_resets_of_cut_moments_equal_those_of_whole_ones(size: int, mode: Any) -> None:
    """All of the port but the processes: a reset on every rank's slices, put together again."""
    config = ResetConfig(mode=mode, fraction=0.5)

    def rank_part(rank: int, sum_over_ranks: Sum, of: int) -> tuple[float, list[torch.Tensor]]:
        cut = Cut(of, rank, sum_over_ranks)
        layout = cut.layout()
        cut.step()
        state, _ = state_of(cut, layout)
        named = {f"p{index}": parameter for index, parameter in enumerate(cut.flat)}
        counts = reset_moments(state.moments, state.weights, named, config, 42, 1)
        share = reset_share(int(counts[0]), int(counts[1]), config)
        moments = []
        for parameter in cut.flat:
            full, shard = torch.zeros(parameter.numel()), state.moments.shard(parameter)
            if shard is not None:
                full[shard.start : shard.start + shard.exp_avg.numel()] = shard.exp_avg
            moments.append(full)
        return share, moments

    ((share, expected),) = on_ranks(1, lambda rank, total: rank_part(rank, total, 1))
    found = on_ranks(size, lambda rank, total: rank_part(rank, total, size))
    assert [part[0] for part in found] == [share] * size
    for index, moment in enumerate(expected):
        assert torch.equal(torch.stack([part[1][index] for part in found]).sum(0), moment)


@given(st.integers(1, 1000), st.integers(1, 70))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_stage_3_slices_are_disjoint_and_complete(elements: int, size: int) -> None:
    at = 0
    for rank in range(size):
        start, length = slice_of(elements, rank, size)
        assert start == at
        assert 0 <= length <= -(-elements // size)
        at += length
    assert at == elements
