"""Which vectors and candidates a switch takes: how many, how often, and what meets what."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch

from relora_ds.config.methods.switchlora import SwitchLoRAConfig
from relora_ds.methods.switchlora.plan import (
    SELECTIONS,
    PairCensus,
    RandomSelection,
    RingSelection,
    Selection,
    SwitchState,
    switch_counts,
)

RANK, SLOTS, FREEZE = 8, 24, 5
ALIVE = (np.ones(RANK, dtype=bool), np.ones(RANK, dtype=bool))


def config(**settings: object) -> SwitchLoRAConfig:
    return SwitchLoRAConfig.model_validate({"name": "switchlora", "rank": 128, **settings})


def run(selection: Selection, steps: int, count: int = 1) -> list[tuple[SwitchState, list[int]]]:
    """States after each event with the freeze of counterparts, and the A slots that came in."""
    state = selection.initial()
    thaw = [np.zeros(selection.rank, dtype=int) for _ in "AB"]
    seen = []
    for step in range(1, steps):
        live = (thaw[0] <= step, thaw[1] <= step)
        plan = selection.plan(state, step, count, live)
        rows, cols = plan.vectors
        assert not set(rows) & set(cols), "a pair may lose one side only"
        for vectors in plan.vectors:
            assert (live[0] & live[1])[vectors].all(), "a frozen pair was switched"
        for held, slots in zip(state.slots, plan.slots, strict=True):
            assert not set(held) & set(slots), "a candidate in use was chosen"
        thaw[1][rows], thaw[0][cols] = step + FREEZE, step + FREEZE
        state.apply(plan)
        for held in state.slots:
            assert len(set(held)) == selection.rank, "two vectors hold one slot"
        seen.append((state, plan.slots[0].tolist()))
    return seen


@pytest.mark.parametrize("name", ["random", "ring"])
def test_plans_keep_their_promises(name: Literal["random", "ring"]) -> None:
    for rank, slots, count in ((8, 24, 1), (8, 10, 2), (16, 17, 1), (5, 12, 3)):
        run(SELECTIONS[name]("q", rank, slots, 1), 200, count)


def test_no_candidate_comes_twice_before_all_were_used() -> None:
    came = [slot for _, slots in run(RandomSelection("q", RANK, SLOTS, 1), 400) for slot in slots]
    assert len(came) > 8 * SLOTS
    first = came[: SLOTS - RANK]
    assert set(first) == set(range(SLOTS - RANK)), "the first round is of those never active"
    last = {slot: -1 for slot in range(SLOTS)}
    for number, slot in enumerate(came):
        if last[slot] >= 0:
            # between two turns of a candidate every other one had one or was in use
            between = set(came[last[slot] + 1 : number])
            assert len(between) >= 1
        last[slot] = number
    shares = np.bincount(came[SLOTS - RANK :], minlength=SLOTS) / len(came[SLOTS - RANK :])
    assert shares.min() > 0.5 / SLOTS
    assert shares.max() < 2.0 / SLOTS


def test_random_covers_pairs_and_the_ring_only_two_per_candidate() -> None:
    found = {}
    for name, kind in SELECTIONS.items():
        selection = kind("q", RANK, SLOTS, 3)
        census, state = PairCensus(SLOTS), selection.initial()
        census.note(state.slots)
        thaw = [np.zeros(RANK, dtype=int) for _ in "AB"]
        for step in range(1, 3000):
            plan = selection.plan(state, step, 1, (thaw[0] <= step, thaw[1] <= step))
            thaw[1][plan.vectors[0]] = thaw[0][plan.vectors[1]] = step + FREEZE
            state.apply(plan)
            census.note(state.slots)
        found[name] = census.pairs
    assert found["ring"] <= 3 * SLOTS
    assert found["random"] > 0.9 * SLOTS**2


def test_ring_starts_as_the_authors() -> None:
    selection = RingSelection("q", 8, 24, 1)
    state = selection.initial()
    assert state.slots[0].tolist() == list(range(16, 24))
    # slot[i] = N - r + ((i - r / 2) mod r)
    assert state.slots[1].tolist() == [16 + (i - 4) % 8 for i in range(8)]
    plan = selection.plan(state, 1, 2, ALIVE)
    assert [v.tolist() for v in plan.vectors] == [[0, 1], [4, 5]]
    assert [s.tolist() for s in plan.slots] == [[0, 1], [0, 1]]


def test_plans_depend_on_seed_layer_and_step_only() -> None:
    def plan(name: str = "q", seed: int = 1, step: int = 7) -> list[list[int]]:
        selection = RandomSelection(name, RANK, SLOTS, seed)
        made = selection.plan(selection.initial(), step, 2, ALIVE)
        return [a.tolist() for a in (*made.vectors, *made.slots)]

    assert plan() == plan()
    assert plan() != plan(name="k")
    assert plan() != plan(seed=2)
    assert plan()[:2] != plan(step=8)[:2]


def test_a_state_restored_in_the_middle_goes_on_the_same() -> None:
    selection = RandomSelection("q", RANK, SLOTS, 1)
    state = selection.initial()
    for step in range(1, 60):
        state.apply(selection.plan(state, step, 2, ALIVE))
    fresh = RandomSelection("q", RANK, SLOTS, 1)
    copied = SwitchState((state.slots[0].copy(), state.slots[1].copy()), state.cursors)
    for step in range(60, 120):
        plan, again = selection.plan(state, step, 2, ALIVE), fresh.plan(copied, step, 2, ALIVE)
        assert [a.tolist() for a in plan.slots] == [a.tolist() for a in again.slots]
        state.apply(plan)
        copied.apply(again)


def test_counts_are_the_expectation_on_average() -> None:
    expected = 3.2
    draws = np.array([switch_counts(expected, 20, 5, step) for step in range(500)]).ravel()
    assert set(draws) == {3, 4}
    error = math.sqrt(0.2 * 0.8 / draws.size)
    assert abs(draws.mean() - expected) < 3 * error


def test_frequency_falls_as_in_the_paper() -> None:
    steps, settings = 40_000, config()
    rates = [settings.expected_switches(step, steps) for step in range(steps)]
    assert rates[0] == pytest.approx(128 / 40, rel=1e-3)
    assert rates[3999] == pytest.approx(0.3 * 128 / 40, rel=1e-6)
    # r T / 481.6, the published volume
    assert sum(rates) == pytest.approx(128 * steps / 481.6, rel=0.02)
    assert min(rates) > 0.0
    half = np.searchsorted(np.cumsum(rates), sum(rates) / 2)
    assert half == pytest.approx(2303, rel=0.01)


def test_a_round_has_the_switches_of_its_updates() -> None:
    steps, settings = 1000, config()
    single = [settings.switches_between(step - 1, step, steps) for step in range(1, steps)]
    assert single == [settings.expected_switches(step, steps) for step in range(1, steps)]
    rounds = [settings.switches_between(at, at + 25, steps) for at in range(0, 975, 25)]
    assert sum(rounds) == pytest.approx(sum(single[:975]))


def test_pairs_survive_a_round_trip() -> None:
    census = PairCensus(5)
    census.note((np.array([0, 3]), np.array([4, 4])))
    bits = census.tensor()
    assert bits.dtype == torch.uint8
    other = PairCensus(5)
    other.load(bits)
    assert other.pairs == census.pairs == 2
    other.note((np.array([0, 1]), np.array([4, 1])))
    assert other.pairs == 3
