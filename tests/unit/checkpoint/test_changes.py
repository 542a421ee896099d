"""Where a run may go on longer than it was planned, and with another schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relora_ds.checkpoint.changes import check_resume
from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.config.load import load_run_config
from relora_ds.errors import CheckpointError
from tests.golden.make_checkpoint import ROOT, run_file
from tests.unit.checkpoint.conftest import Saved

WSD = {"name": "wsd", "warmup_steps": 1, "min_lr_ratio": 0.1}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths in the golden run's description are relative to it."""
    monkeypatch.chdir(ROOT)


def trained_with(saved: Saved, schedule: dict[str, Any], steps: int) -> None:
    """Say that the checkpoint, which is of step 5, is of such a run; the method began at 2."""

    def change(run: dict[str, Any]) -> None:
        run["schedule"] = schedule
        run["train"]["steps"] = steps

    saved.edit("run.yaml", change)


def goes_on(saved: Saved, schedule: dict[str, Any], steps: int, *more: str) -> None:
    keys = [f"schedule.{key}={value}" for key, value in schedule.items()]
    run = load_run_config(run_file("relora"), [*keys, f"train.steps={steps}", *more])
    state = SavedRun(saved.path)
    check_resume(state, run.config, run.architecture, state.record.trainer.data_fingerprints)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ((WSD | {"decay_steps": 3}, 9), (WSD | {"decay_steps": 20}, 60)),
        ((WSD | {"decay_steps": 3}, 9), ({"name": "constant", "warmup_steps": 1}, 90)),
        (({"name": "constant", "warmup_steps": 1}, 7), (WSD | {"decay_steps": 40}, 90)),
    ],
)
def test_a_run_goes_on_longer_where_nothing_so_far_would_have_been_different(
    saved: Saved, before: tuple[dict[str, Any], int], now: tuple[dict[str, Any], int]
) -> None:
    trained_with(saved, *before)
    goes_on(saved, *now)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ((WSD | {"decay_steps": 6}, 9), (WSD | {"decay_steps": 20}, 60)),  # the decay has begun
        (({"name": "cosine", "warmup_steps": 1}, 9), ({"name": "cosine", "warmup_steps": 1}, 60)),
        ((WSD | {"decay_steps": 3}, 9), (WSD | {"warmup_steps": 3, "decay_steps": 20}, 60)),
    ],
)
def test_other_rates_in_the_past_are_refused(
    saved: Saved, before: tuple[dict[str, Any], int], now: tuple[dict[str, Any], int]
) -> None:
    trained_with(saved, *before)
    with pytest.raises(CheckpointError, match=r"train\.steps +9 +60"):
        goes_on(saved, *now)


def test_a_longer_run_excuses_no_other_change(saved: Saved) -> None:
    trained_with(saved, WSD | {"decay_steps": 3}, 9)
    with pytest.raises(CheckpointError, match=r"optimizer\.lr") as caught:
        goes_on(saved, WSD | {"decay_steps": 20}, 60, "optimizer.lr=0.5")
    assert "train.steps" not in str(caught.value)


def test_the_stable_phase_is_pointed_out_once_the_rate_has_decayed(
    saved: Saved, tmp_path: Path
) -> None:
    trained_with(saved, WSD | {"decay_steps": 6}, 9)
    with pytest.raises(CheckpointError) as caught:
        goes_on(saved, WSD | {"decay_steps": 20}, 60)
    assert "step_3" not in str(caught.value)  # it is not there
    (tmp_path / "step_3").mkdir()
    with pytest.raises(CheckpointError, match=f"checkpoint.resume={tmp_path / 'step_3'}"):
        goes_on(saved, WSD | {"decay_steps": 20}, 60)


@pytest.mark.parametrize(
    ("phase", "before", "now"),
    [
        ("relora", 2, 0),
        ("relora", 2, 3),
        ("relora", 2, 6),  # the checkpoint, of step 5, is not of that phase then
        ("full", 6, 4),  # the warm start would have been over
        ("full", 6, 0),
    ],
)
def test_a_warm_start_that_is_over_cannot_be_changed(
    saved: Saved, phase: str, before: int, now: int
) -> None:
    saved.edit("run.yaml", lambda run: run["method"].update(warm_start_steps=before))
    saved.edit("trainer.json", lambda state: state.update(phase=phase))
    allowed = ["checkpoint.allow_change=[method.warm_start_steps]"]
    goes_on(saved, {}, 8, f"method.warm_start_steps={before}", *allowed)
    with pytest.raises(
        CheckpointError, match=r"step 5 in the phase .*cannot be changed|run has re"
    ):
        goes_on(saved, {}, 8, f"method.warm_start_steps={now}", *allowed)


@pytest.mark.parametrize("now", [5, 6])
def test_a_warm_start_that_goes_on_may_end_elsewhere(saved: Saved, now: int) -> None:
    saved.edit("run.yaml", lambda run: run["method"].update(warm_start_steps=7))
    saved.edit("trainer.json", lambda state: state.update(phase="full"))
    allowed = ["checkpoint.allow_change=[method.warm_start_steps]"]
    goes_on(saved, {}, 8, f"method.warm_start_steps={now}", *allowed)


def test_fewer_steps_than_a_checkpoint_has_are_no_course_of_its_phases(saved: Saved) -> None:
    goes_on(saved, {}, 4, "checkpoint.allow_change=[train.steps]")
