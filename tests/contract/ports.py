"""What every implementation of the port `TrainState` keeps to, as checks on any of them.

A check asserts on every rank; a rank that fails ends its group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from relora_ds.methods.train_state import TrainState
from relora_ds.numerics.base_weight import WeightEdit
from relora_ds.numerics.batched.exchange import Exchange

INDEX = torch.tensor([3, 0])
"""The vectors that checks work on, out of order."""


@dataclass(frozen=True)
class Subject:
    """A state of a run of SwitchLoRA with one completed update, and one layer of it.

    Args:
        state: the implementation.
        weight: (m, n), frozen and edited.
        lora_a: (r, n), whose rows are its vectors.
        lora_b: (m, r), whose columns are its vectors.
        total: the sum of a tensor over all ranks.
        shapes: those of the three.
    """

    state: TrainState
    weight: nn.Parameter
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    total: Callable[[torch.Tensor], torch.Tensor]
    shapes: tuple[torch.Size, torch.Size, torch.Size]

    @property
    def factors(self) -> list[tuple[nn.Parameter, torch.Size, int]]:
        """Both factors with their shapes and the axis of their vectors."""
        return [(self.lora_a, self.shapes[1], 0), (self.lora_b, self.shapes[2], 1)]

    def whole_moments(self, parameter: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Both moments put together from the ranks, and on how many ranks each element is."""
        shape = self.state.weights.shape(parameter)
        parts = torch.zeros(3, shape.numel())
        shard = self.state.moments.shard(parameter)
        if shard is not None:
            own = slice(shard.start, shard.start + shard.exp_avg.numel())
            parts[0, own], parts[1, own], parts[2, own] = shard.exp_avg, shard.exp_avg_sq, 1.0
        parts = self.total(parts)
        copies = int(parts[2, 0])
        assert bool((parts[2] == copies).all()), "shards overlap or leave elements out"
        first, second = (part.view(shape) / copies for part in parts[:2])
        return first, second, copies


def pattern(shape: torch.Size, number: int) -> torch.Tensor:
    """Values of both signs, some of them zero, exact in bf16; another tensor for every number."""
    values = (torch.arange(shape.numel()) * (13 + 2 * number) + number) % 101 - 50
    return values.view(shape) / 8


def fill_moments(subject: Subject) -> None:
    """Give both factors the moments `pattern(shape, 1)` and |`pattern(shape, 2)`|."""
    for parameter, shape, _ in subject.factors:
        shard = subject.state.moments.shard(parameter)
        if shard is not None:
            own = slice(shard.start, shard.start + shard.exp_avg.numel())
            shard.exp_avg.copy_(pattern(shape, 1).view(-1)[own])
            shard.exp_avg_sq.copy_(pattern(shape, 2).abs().view(-1)[own])


def what_is_written_is_gathered(subject: Subject) -> None:
    weights = subject.state.weights
    for number, (parameter, shape, _) in enumerate(subject.factors):
        assert weights.shape(parameter) == shape
        weights.write(parameter, pattern(shape, number))
    parameters = [subject.lora_a, subject.lora_b]
    for number, (value, shape) in enumerate(
        zip(weights.gather(parameters), subject.shapes[1:], strict=True)
    ):
        assert torch.equal(value.float(), pattern(shape, number))
    in_turn = list(weights.gather_in_turn([parameters, [subject.lora_b]]))
    assert [len(values) for values in in_turn] == [2, 1]
    assert torch.equal(in_turn[0][0].float(), pattern(subject.shapes[1], 0))
    assert torch.equal(in_turn[1][0].float(), pattern(subject.shapes[2], 1))


def an_edit_is_the_product(subject: Subject) -> None:
    (rows, cols), weights = subject.shapes[0], subject.state.weights
    assert weights.shape(subject.weight) == (rows, cols)
    eye = torch.eye(cols)
    before = weights.times(subject.weight, eye)
    # small beside the weight, so that a working precision of 16 bits would lose most of it
    left, right = pattern(torch.Size([rows, 2]), 3), pattern(torch.Size([2, cols]), 4) * 2.0**-13
    sums = weights.add_product(subject.weight, left, right, 0.5)
    assert sums is not None
    edit = WeightEdit.of(weights.totals([sums])[0].tolist())
    assert 0 < edit.elements <= rows * cols  # of a sample of rows
    assert 0.0 < edit.lost_sq < 1e-6 * edit.intended_sq
    elements, ranks = subject.total(torch.tensor([float(edit.elements), 1.0])).tolist()
    assert elements == ranks * edit.elements, "the ranks report different totals"
    assert weights.add_product(subject.weight, left, right, 0.25, measured=False) is None
    change = weights.times(subject.weight, eye).double() - before.double()
    expected = 0.75 * left.double() @ right.double()
    assert float((change - expected).abs().max()) <= 1e-6 * float(before.abs().max())
    probe = pattern(torch.Size([cols, 3]), 5)
    product = (before.double() + expected) @ probe.double()
    found = weights.times(subject.weight, probe)
    torch.testing.assert_close(found.double(), product, rtol=1e-5, atol=1e-5)


def an_exchange_is_absorbed(subject: Subject) -> None:
    (rows, cols), weights = subject.shapes[0], subject.state.weights
    kind, eye = subject.lora_a.dtype, torch.eye(cols)
    before = weights.times(subject.weight, eye)
    shapes = (4, cols), (4, rows), (2, cols), (2, rows)
    vectors = [pattern(torch.Size(s), n).to(kind) for n, s in enumerate(shapes)]
    exchange = Exchange(*vectors, scale=2.0**-12)
    old, columns, new, new_columns = (each.double() for each in vectors)
    change = columns[:2].t() @ (old[:2] - new) + (columns[2:] - new_columns).t() @ old[2:]
    sums = weights.absorb([(subject.weight, exchange)], measured=True)
    assert sums is not None
    edit = WeightEdit.of(weights.totals(sums)[0].tolist())
    assert 0.0 < edit.lost_sq < 1e-6 * edit.intended_sq
    assert weights.absorb([(subject.weight, exchange)], measured=False) is None
    found = weights.times(subject.weight, eye).double() - before.double()
    expected = 2.0 * 2.0**-12 * change
    assert float((found - expected).abs().max()) <= 1e-6 * float(before.abs().max())


def moments_are_sharded_and_live(subject: Subject) -> None:
    fill_moments(subject)
    for parameter, shape, _ in subject.factors:
        first, second, _ = subject.whole_moments(parameter)
        assert torch.equal(first, pattern(shape, 1))
        assert torch.equal(second, pattern(shape, 2).abs())


def counts_and_order_statistics_are_of_whole_moments(subject: Subject) -> None:
    fill_moments(subject)
    moments = subject.state.moments
    parameters = [subject.lora_a, subject.lora_b]
    values = [(pattern(s, 1), pattern(s, 2).abs()) for s in subject.shapes[1:]]
    count = sum(int(value.count_nonzero()) for both in values for value in both)
    assert moments.count_non_zero(parameters) == count
    assert count < sum(value.numel() for both in values for value in both)
    ks = [7, 41]
    for found, both, k in zip(moments.order_statistics(parameters, ks), values, ks, strict=True):
        for statistic, value in zip(found, both, strict=True):
            assert float(statistic) == float(value.abs().view(-1).kthvalue(k).values)


def a_restart_is_of_every_vector(subject: Subject) -> None:
    fill_moments(subject)
    for parameter, shape, axis in subject.factors:
        assert subject.state.moments.restart(parameter) == shape[axis]
        assert torch.equal(subject.whole_moments(parameter)[0], pattern(shape, 1))


def vectors_are_rows(subject: Subject) -> None:
    vectors, weights = subject.state.vectors, subject.state.weights
    for parameter, shape, axis in subject.factors:
        expected = pattern(shape, 6)
        weights.write(parameter, expected)
        rows = expected if axis == 0 else expected.t()
        number = torch.tensor([[5], [8]])
        (at,), (arrived,) = vectors.locate([(parameter, INDEX)], [number])
        assert at.parameter is parameter
        assert torch.equal(arrived, number)
        (found,) = vectors.gather([at])
        assert torch.equal(found.float(), rows[INDEX])
        found.zero_()  # a copy
        new = pattern(torch.Size([len(INDEX), rows.shape[1]]), 7)
        vectors.write([(at, new)])
        rows[INDEX] = new
        assert torch.equal(weights.gather([parameter])[0].float(), expected)
    length = subject.shapes[0][1]
    start, stop = subject.state.host.span(length)
    kept = pattern(torch.Size([2, length]), 8)
    own = kept[:, start:stop].to(subject.lora_a.dtype)
    located, _ = vectors.locate([(subject.lora_a, INDEX)])
    factor, stored = vectors.gather(located, [(length, own)])
    assert factor.shape == (len(INDEX), length)
    assert torch.equal(stored.float(), kept)


def a_reset_forgets_and_freezes(subject: Subject) -> None:
    fill_moments(subject)
    vectors = subject.state.vectors
    for parameter, shape, axis in subject.factors:
        copies = subject.whole_moments(parameter)[2]
        expected = pattern(shape, 1), pattern(shape, 2).abs()
        for moment in expected:
            (moment if axis == 0 else moment.t())[INDEX] = 0.0
        elements = vectors.reset(vectors.locate([(parameter, INDEX)])[0], frozen=2)
        total = int(subject.total(torch.tensor([float(elements)])))
        assert total == copies * 2 * len(INDEX) * shape[1 - axis]
        for found, moment in zip(subject.whole_moments(parameter)[:2], expected, strict=True):
            assert torch.equal(found, moment)
        others = [i for i in range(shape[axis]) if i not in INDEX.tolist()]
        for ahead, live in ((0, False), (1, False), (2, True)):
            found = vectors.live(parameter, ahead)
            assert found.shape == (shape[axis],)
            assert bool((found[INDEX] == live).all())
            assert bool(found[others].all())


def host_memory_is_shared_and_collected(subject: Subject) -> None:
    host, length = subject.state.host, subject.shapes[0][1]
    start, stop = host.span(length)
    assert 0 <= start < stop <= length
    held = host.node_bytes
    tensor = host.tensor((2, stop - start), torch.float32)
    assert tensor.shape == (2, stop - start)
    assert not tensor.any()
    subject.total(torch.zeros(1))  # the writer waits until everybody has looked
    assert host.node_bytes >= held + tensor.numel() * 4
    whole = pattern(torch.Size([2, length]), 9)
    if host.is_writer:
        tensor.copy_(whole[:, start:stop])
    subject.total(torch.zeros(1))  # wait for the writer
    assert torch.equal(tensor, whole[:, start:stop])
    collected = host.collect(tensor, length)
    holders = subject.total(torch.tensor([float(collected is not None)]))
    assert float(holders) == 1.0
    if collected is not None:
        assert torch.equal(collected, whole)


CHECKS: tuple[Callable[[Subject], None], ...] = (
    what_is_written_is_gathered,
    an_edit_is_the_product,
    an_exchange_is_absorbed,
    moments_are_sharded_and_live,
    counts_and_order_statistics_are_of_whole_moments,
    a_restart_is_of_every_vector,
    vectors_are_rows,
    a_reset_forgets_and_freezes,
    host_memory_is_shared_and_collected,
)
