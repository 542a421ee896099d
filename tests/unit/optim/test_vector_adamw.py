"""AdamW with a clock per vector against torch's and against a textbook loop, at every cut."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_ds.optim.vector_adamw import VectorAdamW, _runs, storage_key
from relora_ds.optim.vector_clock import Fragment, VectorClock

BETAS, EPS, LR, DECAY = (0.9, 0.999), 1e-8, 1e-2, 0.1
SHAPES = {"plain": ((5,), None), "lora_A": ((3, 4), 0), "lora_B": ((5, 3), 1), "tail": ((2,), None)}
"""Shape and axis of the vectors of each parameter in the flat tensor, in order of offset."""


@dataclass
class Textbook:
    """Adam as in the paper with decoupled decay, one loop turn per vector, in float64."""

    values: torch.Tensor
    axis: int | None
    state: dict[int, list[Any]] = field(default_factory=dict)
    """Per vector: first moment, second moment, steps taken, steps left to be frozen."""

    def vector(self, index: int) -> torch.Tensor:
        return self.values if self.axis is None else self.values.select(self.axis, index)

    def __post_init__(self) -> None:
        for index in range(1 if self.axis is None else self.values.shape[self.axis]):
            zero = torch.zeros_like(self.vector(index))
            self.state[index] = [zero, zero.clone(), 0, 0]

    def update(self, grad: torch.Tensor, decay: float) -> None:
        for index, state in self.state.items():
            g = grad if self.axis is None else grad.select(self.axis, index)
            g = torch.zeros_like(g) if state[3] else g
            state[2] += 1
            state[0] = BETAS[0] * state[0] + (1 - BETAS[0]) * g
            state[1] = BETAS[1] * state[1] + (1 - BETAS[1]) * g**2
            if state[3]:
                state[3] -= 1
                continue
            first = state[0] / (1 - BETAS[0] ** state[2])
            second = state[1] / (1 - BETAS[1] ** state[2])
            value = self.vector(index)
            value.mul_(1 - LR * decay).sub_(LR * first / (second.sqrt() + EPS))


def flat_size() -> int:
    return sum(math.prod(shape) for shape, _ in SHAPES.values())


def clocks() -> dict[str, VectorClock]:
    return {n: VectorClock(s[axis], axis) for n, (s, axis) in SHAPES.items() if axis is not None}


def fragments_of(known: dict[str, VectorClock], begin: int, end: int) -> list[Fragment]:
    """Clocked fragments of elements [begin, end) of the flat tensor."""
    fragments, offset = [], 0
    for name, (shape, _) in SHAPES.items():
        size = math.prod(shape)
        start, stop = max(begin - offset, 0), min(end - offset, size)
        if name in known and start < stop:
            at = offset + start - begin
            fragments.append(Fragment(start, at, stop - start, known[name], shape[-1]))
        offset += size
    return fragments


def cut_optimizer(
    flat: torch.Tensor, cuts: list[int], known: dict[str, VectorClock], decay: float
) -> tuple[VectorAdamW, list[torch.Tensor]]:
    pairs = list(pairwise([0, *cuts, flat.numel()]))
    parts = [flat[begin:end].clone() for begin, end in pairs]
    optimizer = VectorAdamW(
        [{"params": [part for part in parts if part.numel()]}],
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=decay,
    )
    optimizer.fragments = {
        storage_key(part): fragments_of(known, begin, end)
        for part, (begin, end) in zip(parts, pairs, strict=True)
        if part.numel()
    }
    return optimizer, parts


def step(optimizer: VectorAdamW, parts: list[torch.Tensor], grad: torch.Tensor) -> torch.Tensor:
    """One update of all parts; the whole flat tensor afterwards."""
    at = 0
    for part in parts:
        part.grad = grad[at : at + part.numel()].clone()
        at += part.numel()
    optimizer.step()
    return torch.cat(parts)


def pieces(flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of the parameters in a flat tensor."""
    views, offset = {}, 0
    for name, (shape, _) in SHAPES.items():
        views[name] = flat[offset : offset + math.prod(shape)].view(shape)
        offset += math.prod(shape)
    return views


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.0, 0.9)])
def test_without_clocks_it_is_torch_adamw(weight_decay: float, betas: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(4, 3, generator=generator).double(), torch.randn(7).double()]
    ours, theirs = [[t.clone() for t in start] for _ in range(2)]
    options: dict[str, Any] = {"lr": LR, "betas": betas, "weight_decay": weight_decay}
    mine = VectorAdamW([{"params": ours[:1]}, {"params": ours[1:], "lr": 0.5}], **options)
    reference = torch.optim.AdamW(
        [{"params": theirs[:1]}, {"params": theirs[1:], "lr": 0.5}], **options
    )
    for number in range(30):
        for group in (*mine.param_groups, *reference.param_groups):
            group["lr"] *= 1.0 + 0.1 * number % 0.3
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator).double()
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(mine.state[a][key], reference.state[b][key])


def test_fp32_stays_close_to_torch_adamw() -> None:
    generator = torch.Generator().manual_seed(1)
    ours = torch.randn(1000, generator=generator)
    theirs = ours.clone()
    mine, reference = VectorAdamW([ours], lr=1e-3), torch.optim.AdamW([theirs], weight_decay=0.0)
    for _ in range(100):
        ours.grad = torch.randn(1000, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    assert float((ours - theirs).abs().max()) < 1e-6


def test_no_gradient_no_update_and_no_state() -> None:
    tensor = torch.ones(3)
    optimizer = VectorAdamW([tensor])
    optimizer.step()
    assert tensor.tolist() == [1, 1, 1]
    assert not optimizer.state


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("cut", range(flat_size() + 1))
def test_every_cut_equals_the_textbook(cut: int, decay: float) -> None:
    """Restarts and freezes of some vectors of either axis; the state is cut in two anywhere."""
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(flat_size(), generator=generator, dtype=torch.float64)
    known = clocks()
    optimizer, parts = cut_optimizer(start, [cut], known, decay)
    expected = start.clone()
    books = {n: Textbook(v, SHAPES[n][1]) for n, v in pieces(expected).items()}
    for done in range(14):
        if done in (3, 7):
            for name, restarted, frozen in (("lora_A", [0, 2], [2]), ("lora_B", [1], [0, 1])):
                known[name].restart(done, torch.tensor(restarted))
                known[name].freeze(done + 5, torch.tensor(frozen))
                for index in restarted:
                    books[name].state[index][2] = 0
                for index in frozen:
                    books[name].state[index][3] = 5
        if done == 10:
            known["lora_B"].restart(done)
            for state in books["lora_B"].state.values():
                state[2] = 0
        grad = torch.randn(flat_size(), generator=generator, dtype=torch.float64)
        flat = step(optimizer, parts, grad)
        for name, piece in pieces(grad).items():
            books[name].update(piece, decay)
        torch.testing.assert_close(flat, expected, rtol=1e-12, atol=1e-12)


def test_frozen_vectors_keep_their_bits_while_others_move() -> None:
    known = clocks()
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(flat_size(), generator=generator)
    optimizer, parts = cut_optimizer(start, [9, 20], known, DECAY)
    before = start
    for _ in range(3):
        before = step(optimizer, parts, torch.randn(flat_size(), generator=generator))
    # moments are not zeroed: they alone must not move a frozen vector
    known["lora_A"].freeze(6, torch.tensor([1]))
    known["lora_B"].freeze(8, torch.tensor([0, 2]))
    for done in range(3, 10):
        after = step(optimizer, parts, torch.randn(flat_size(), generator=generator))
        still = {n: after == before for n, before, after in both(before, after)}
        assert bool(still["lora_A"][1].all()) is (done < 6)
        assert bool(still["lora_B"][:, [0, 2]].all()) is (done < 8)
        assert not still["lora_A"][[0, 2]].any()
        assert not still["lora_B"][:, 1].any()
        assert not still["plain"].any()
        assert not still["tail"].any()
        if done >= 8:
            assert not still["lora_B"].any()
        before = after


def both(before: torch.Tensor, after: torch.Tensor) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    pairs = zip(pieces(before).items(), pieces(after).values(), strict=True)
    return [(name, old, new) for (name, old), new in pairs]


def test_first_update_after_a_restart_and_after_five_frozen_ones() -> None:
    """1 lr right after a restart; 0.522 lr when the step counted on through five frozen updates."""
    clock = VectorClock(2, axis=0)
    tensor = torch.zeros(2, 3, dtype=torch.float64)
    optimizer = VectorAdamW([tensor], lr=LR)
    optimizer.fragments = {storage_key(tensor): [Fragment(0, 0, 6, clock, 3)]}
    moved = []
    for done in range(16):
        if done == 10:
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[tensor][moment].zero_()
            clock.restart(done)
            clock.freeze(done + 5, torch.tensor([1]))
        before = tensor.clone()
        tensor.grad = torch.full_like(tensor, 0.3)
        optimizer.step()
        moved.append(((before - tensor) / LR)[:, 0].tolist())
    assert moved[0] == pytest.approx([1.0, 1.0], rel=1e-6)
    assert moved[10] == pytest.approx([1.0, 0.0], rel=1e-6)
    assert [second for _, second in moved[10:15]] == [0.0] * 5
    assert moved[15][1] == pytest.approx(0.522, abs=5e-4)


def test_an_unknown_flat_tensor_is_an_error() -> None:
    tensor, other = torch.zeros(3), torch.zeros(3)
    optimizer = VectorAdamW([tensor])
    optimizer.fragments = {storage_key(other): []}
    tensor.grad = torch.ones(3)
    with pytest.raises(KeyError):
        optimizer.step()


def test_a_view_of_the_same_memory_is_the_same_flat_tensor() -> None:
    tensor = torch.zeros(6)
    assert storage_key(tensor) == storage_key(tensor.detach().view(2, 3)[1:])
    assert storage_key(tensor) != storage_key(tensor.clone())


def test_the_step_is_one_scalar_on_the_host() -> None:
    tensor = torch.zeros(3)
    tensor.grad = torch.ones(3)
    optimizer = VectorAdamW([tensor])
    for _ in range(4):
        optimizer.step()
    state = optimizer.state[tensor]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert state["step"].shape == ()
    assert state["step"].device.type == "cpu"
    assert float(state["step"]) == 4.0


@st.composite
def clocked_flats(draw: st.DrawFn) -> tuple[list[Fragment], int, int]:
    """Fragments with gaps between them, clocks of equal, mixed and frozen ages, and a step."""
    step = draw(st.integers(1, 20))
    fragments, at = [], 0
    for _ in range(draw(st.integers(0, 6))):
        at += draw(st.integers(0, 3))
        length, cols = draw(st.integers(1, 12)), draw(st.integers(1, 4))
        clock = VectorClock(4, axis=0)
        clock.restart(draw(st.integers(0, step - 1)))
        if draw(st.booleans()):
            clock.restart(draw(st.integers(0, step - 1)), torch.tensor([1]))
        if draw(st.booleans()):
            clock.freeze(draw(st.integers(0, step + 3)), torch.tensor([2]))
        fragments.append(Fragment(0, at, length, clock, cols))
        at += length
    return fragments, step, at + draw(st.integers(0, 3))


@given(clocked_flats())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_runs_cover_everything_once_with_the_right_age(
    case: tuple[list[Fragment], int, int],
) -> None:
    fragments, number, length = case
    owner: list[Fragment | None] = [None] * length
    for fragment in fragments:
        owner[fragment.offset : fragment.end] = [fragment] * fragment.length
    differ = any(fragment.clock.common_birth(number - 1) is None for fragment in fragments)
    at, previous = 0, None
    for run in _runs(fragments, number, length):
        if isinstance(run, Fragment):
            start, stop = run.offset, run.end
            assert differ, "plain AdamW would do"
            assert owner[start:stop] == [run] * (stop - start)
        else:
            start, stop, age = run
            assert previous != age, "two runs of one age would be one"
            for fragment in owner[start:stop]:
                if fragment is None:
                    assert age == number
                else:
                    assert not differ, "a call for each of these stretches"
                    assert set(fragment.clock.ages(number).tolist()) == {age}
                    assert fragment.clock.live(number - 1).all()
        assert start == at < stop
        at, previous = stop, None if isinstance(run, Fragment) else run[2]
    assert at == length
