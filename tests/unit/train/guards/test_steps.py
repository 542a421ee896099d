"""What a guard decides, and what it remembers of that."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from relora_ds.checkpoint.format.record import GuardState
from relora_ds.config.sections import GuardsConfig, LossSpikeConfig
from relora_ds.errors import DivergenceError
from relora_ds.train.guards.steps import StepGuard

Noted = list[tuple[int, str]]


@pytest.fixture(autouse=True, scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("ranks") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def guard(noted: Noted | None = None, state: GuardState | None = None, **keys: object) -> StepGuard:
    """A guard that writes what it notes to a list."""
    to: Noted = [] if noted is None else noted
    config = GuardsConfig.model_validate(keys)
    return StepGuard(config, state or GuardState(), lambda at, action, why: to.append((at, action)))


def decide(which: StepGuard, step: int, loss: float, norm: float = 1.0) -> bool:
    """Whether an update of this loss and gradient norm is applied."""
    admit = which.admit(step)
    assert admit is not None
    return admit(torch.tensor([loss, norm**2, norm**2], dtype=torch.float64))


SPIKES = LossSpikeConfig(action="skip", window=8).model_dump()


def test_by_default_nothing_is_asked_before_an_update() -> None:
    assert guard().admit(0) is None
    assert guard().metrics() == {}


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan)])
def test_skip_refuses_what_is_not_finite_and_counts_it(loss: float, norm: float) -> None:
    noted: Noted = []
    found = guard(noted, non_finite="skip")
    assert decide(found, 0, 2.0)
    assert not decide(found, 1, loss, norm)
    assert noted == [(1, "skip")]
    assert found.metrics() == {"guards/skipped_steps": 1, "guards/rollbacks": 0}
    assert found.state().losses == [2.0]


def test_one_event_too_many_ends_the_run() -> None:
    found = guard(non_finite="skip", max_events=2)
    assert not decide(found, 0, math.nan)
    assert not decide(found, 1, math.nan)
    with pytest.raises(DivergenceError, match="max_events"):
        decide(found, 2, math.nan)


def test_a_spike_that_is_only_warned_about_is_applied_and_remembered() -> None:
    found = guard(loss_spike=SPIKES | {"action": "warn"})
    for step in range(8):
        assert decide(found, step, 2.0 + step % 2)
    assert decide(found, 8, 50.0)
    assert found.state().losses[-1] == 50.0


def test_a_guard_that_is_restored_decides_as_the_one_that_went_on() -> None:
    first = guard(loss_spike=SPIKES)
    for step in range(6):
        decide(first, step, 2.0 + step % 2)
    state = GuardState.model_validate_json(first.state().model_dump_json())
    again = guard(state=state, loss_spike=SPIKES)
    for step, loss in enumerate((2.0, 40.0, 3.0, 5.0), start=6):
        assert decide(again, step, loss) == decide(first, step, loss)
    assert again.state() == first.state()


def test_a_rollback_leaves_out_the_batch_and_keeps_count() -> None:
    found = guard(non_finite="rollback")
    decide(found, 4, 2.0)
    assert not decide(found, 5, math.nan)
    rewind = found.rewind(5, None)
    assert rewind is not None
    assert rewind.steps == (5,)
    again = found.rewound(rewind, GuardState())
    assert [step for step in range(8) if again.leaves_out(step)] == [5]
    assert again.metrics() == {"guards/skipped_steps": 1, "guards/rollbacks": 1}


def test_the_batch_before_is_blamed_for_weights_that_are_not_finite() -> None:
    found = guard(non_finite="rollback")
    decide(found, 5, math.nan)
    rewind = found.rewind(5, "a.weight")
    assert rewind is not None
    assert rewind.steps == (4,)


def test_the_batch_before_is_blamed_too_where_leaving_one_out_did_not_help() -> None:
    found = guard(non_finite="rollback", state=GuardState(left_out=[5]))
    decide(found, 6, math.nan)
    rewind = found.rewind(6, None)
    assert rewind is not None
    assert rewind.steps == (4, 6)


def test_weights_without_an_update_are_nobodys_fault() -> None:
    with pytest.raises(DivergenceError, match="no update was applied"):
        guard(non_finite="rollback").go_back(0, "step 1: broken")


def test_bad_weights_end_a_run_that_may_only_skip() -> None:
    with pytest.raises(DivergenceError, match="validation loss"):
        guard(non_finite="skip").rescue(3, "the validation loss is nan")
