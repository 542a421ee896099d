"""What earlier versions wrote is read as if today's had; what later ones wrote is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.record import TrainerState, read_record
from relora_ds.checkpoint.format.upgrade import FORMAT, KEY, Contents, upgrade
from relora_ds.errors import CheckpointError
from tests.golden.make_checkpoint import checkpoint

FORMAT_0 = {
    "step": 5,
    "tokens": 320,
    "phase": "relora",
    "dp_size": 2,
    "zero_stage": 3,
    "method": {"switched": 3},
    "telemetry": {"wandb_run_id": None},
    "data": ["a", "b"],
    "tensor_size": 4,
}
PATH = Path("step_5") / layout.TRAINER


def upgraded(trainer: dict[str, Any]) -> dict[str, Any]:
    run, model = {"output_dir": "runs/a"}, {"hidden_size": 16}
    found = upgrade(Contents(trainer, run, model), PATH)
    assert (found.run, found.model) == (run, model)
    return found.trainer


def test_format_0() -> None:
    found = upgraded(FORMAT_0)
    # what format 0 does not say: how the method's tensors are sharded, and what came later
    later = {"method_shards", "guards", "arithmetic", "imported_from"}
    assert found.keys() == TrainerState.model_fields.keys() - later
    assert TrainerState.model_validate(found).method_shards is None
    assert found["tp_size"] == 4
    assert found["data_fingerprints"] == ["a", "b"]
    same = FORMAT_0.keys() & found.keys()
    assert len(same) == len(FORMAT_0) - 2
    assert all(found[key] == FORMAT_0[key] for key in same)


def test_format_0_before_tensor_parallelism() -> None:
    trainer = {key: value for key, value in FORMAT_0.items() if key != "tensor_size"}
    assert upgraded(trainer)["tp_size"] == 1


def test_todays_format_is_left_as_it_is() -> None:
    trainer = upgraded(FORMAT_0)
    assert upgraded({KEY: FORMAT, **trainer}) == trainer


@pytest.mark.parametrize("trainer", [{}, {KEY: 0, "data": None}])
def test_what_is_missing_is_left_to_validation(trainer: dict[str, Any]) -> None:
    assert upgraded(trainer)["tp_size"] == 1


@pytest.mark.parametrize("number", [FORMAT + 1, 10**30])
def test_a_later_format_is_refused(number: int) -> None:
    with pytest.raises(CheckpointError) as caught:
        upgraded({KEY: number})
    for words in (str(PATH), f"format is {number}", f"0 to {FORMAT}", "upgrade relora_ds"):
        assert words in str(caught.value)


@pytest.mark.parametrize("number", [-1, True, "1", 1.0, None, []])
def test_what_is_no_number_is_refused(number: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        upgraded({KEY: number})
    for words in (str(PATH), f"format is {json.dumps(number)}", "use another"):
        assert words in str(caught.value)


def test_the_golden_formats_say_the_same() -> None:
    old, new = (read_record(checkpoint("relora", number)) for number in (0, 1))
    assert KEY not in json.loads((checkpoint("relora", 0) / layout.TRAINER).read_text())
    assert json.loads((checkpoint("relora", 1) / layout.TRAINER).read_text())[KEY] == 1
    assert (old.trainer, old.architecture) == (new.trainer, new.architecture)
    elsewhere = old.config.model_copy(update={"output_dir": new.config.output_dir})
    assert elsewhere == new.config
