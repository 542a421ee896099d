"""Whatever is wrong with the descriptions in a checkpoint is one CheckpointError that says what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.record import RunRecord, TrainerState, read_record, write_record
from relora_ds.config.methods.lora import LoRAConfig
from relora_ds.errors import CheckpointError
from tests.golden.make_checkpoint import checkpoint
from tests.unit.checkpoint.conftest import Saved

Change = Callable[[dict[str, Any]], Any]


def put(*keys: str, value: Any) -> Change:
    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


def drop(key: str) -> Change:
    return lambda data: data.pop(key)


def method_of(name: str) -> Change:
    return lambda data: data.__setitem__("method", {"name": name, "rank": 2})


EDITS: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    "text for a number": (layout.TRAINER, put("step", value="5"), ('step: is "5"', "integer")),
    "negative step": (layout.TRAINER, put("step", value=-1), ("step: is -1",)),
    "no such stage": (layout.TRAINER, put("zero_stage", value=4), ("zero_stage: is 4",)),
    "no processes": (layout.TRAINER, put("dp_size", value=0), ("dp_size: is 0",)),
    "method is a list": (layout.TRAINER, put("method", value=[]), ("method: is []",)),
    "missing key": (layout.TRAINER, drop("phase"), ("phase: is missing",)),
    "unknown state": (layout.TRAINER, put("cookies", value=1), ("cookies: unknown key",)),
    "later format": (layout.TRAINER, put("format", value=99), ("format is 99", "upgrade")),
    "unknown phase": (layout.TRAINER, put("phase", value="sltrain"), ("'sltrain'", "relora")),
    "unknown section": (layout.RUN, put("sparkle", value={}), ("sparkle: unknown key",)),
    "unknown key": (
        layout.RUN,
        put("train", "sparkle", value=True),
        (f"{layout.RUN}:", "train.sparkle: unknown key"),
    ),
    "unknown method": (layout.RUN, method_of("dora"), ('method.name: is "dora"',)),
    "another method": (layout.RUN, method_of("lora"), ("phase is 'relora'", "lora")),
    "wrong value": (layout.RUN, put("train", "steps", value=0), ("train.steps: is 0",)),
    "missing section": (layout.RUN, drop("train"), ("train: is missing",)),
    "wrong width": (layout.MODEL, put("hidden_size", value=-16), ("hidden_size: is -16",)),
    "no width": (layout.MODEL, drop("hidden_size"), ("hidden_size: is missing",)),
    "unknown part": (layout.MODEL, put("experts", value=8), ("experts: unknown key",)),
}


@pytest.mark.parametrize("case", EDITS)
def test_wrong_contents(saved: Saved, case: str) -> None:
    name, change, words = EDITS[case]
    saved.edit(name, change)
    with pytest.raises(CheckpointError) as caught:
        DenseModel(saved.path)
    message = str(caught.value)
    assert all(word in message for word in (name, *words)), message
    assert "use another checkpoint" in message or "upgrade" in message
    assert "\n" not in message


FILES: dict[str, bytes] = {
    "empty": b"",
    "half": b'{"step": 5,\n "tokens',
    "a list": b"[1, 2]",
    "a number": b"3",
    "not text": b"\xff\xfe\x00",
    "nested without end": b'{"a":' + b"[" * 100_000,
}


@pytest.mark.parametrize("content", FILES)
@pytest.mark.parametrize("name", [layout.TRAINER, layout.RUN, layout.MODEL])
def test_damaged_files(saved: Saved, name: str, content: str) -> None:
    saved.write(name, FILES[content])
    with pytest.raises(CheckpointError, match=name):
        DenseModel(saved.path)


@pytest.mark.parametrize("name", [layout.RUN, layout.MODEL])
def test_missing_files(saved: Saved, name: str) -> None:
    saved.remove(name)
    with pytest.raises(CheckpointError, match=f"{name}: missing from {layout.MANIFEST}"):
        DenseModel(saved.path)


def test_without_its_state_it_is_no_checkpoint(saved: Saved) -> None:
    saved.remove(layout.TRAINER)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        DenseModel(saved.path)
    with pytest.raises(CheckpointError, match=f"{layout.TRAINER}: cannot be read"):
        read_record(saved.path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"files": 3}', b'{"files": {"a": {}}}'])
def test_damaged_manifests(saved: Saved, content: bytes) -> None:
    (saved.path / layout.MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{layout.MANIFEST}: cannot be read"):
        DenseModel(saved.path)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    known = read_record(checkpoint("relora", 1))
    state = TrainerState(
        step=11,
        tokens=704,
        phase="lora",
        dp_size=3,
        tp_size=2,
        zero_stage=1,
        method={"cursors": {"q_proj": [1, 2]}, "share": 0.25, "none": None},
        telemetry={"wandb_run_id": "abc"},
        data_fingerprints=["f", "g"],
    )
    config = known.config.model_copy(update={"method": LoRAConfig(name="lora", rank=3)})
    record = RunRecord(state, config, known.architecture)
    write_record(record, tmp_path)
    assert read_record(tmp_path) == record
