"""One whole checkpoint, or a refusal that names the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import Listed, write_manifest
from relora_ds.checkpoint.format.record import read_record
from relora_ds.checkpoint.format.stamp import KEY, stamp
from relora_ds.checkpoint.format.tensors import write_tensors
from relora_ds.checkpoint.format.verify import shares, verify_checkpoint
from relora_ds.checkpoint.rewriting.reshape import reshape_checkpoint
from relora_ds.engine.deepspeed.files import read_shard
from relora_ds.errors import CheckpointError
from relora_ds.files.tensors import write_safetensors
from tests.golden.make_checkpoint import ROOT, checkpoint

MODEL = "mp_rank_00_model_states.pt"
OPTIMIZER = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A checkpoint of today's format after 5 updates."""
    path = tmp_path / "step_5"
    shutil.copytree(checkpoint("relora", 2), path)
    return path


def edited(path: Path, **values: Any) -> None:
    """Change keys of `trainer.json`."""
    trainer = path / layout.TRAINER
    trainer.write_text(json.dumps(json.loads(trainer.read_text()) | values))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_format_is_whole(number: int) -> None:
    record = verify_checkpoint(checkpoint("relora", number))
    assert (record.trainer.step, record.format) == (5, number)


def test_a_rewritten_one_is_whole(whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "reshaped" / "step_5"
    target.parent.mkdir()
    reshape_checkpoint(whole, target, dp_size=2, stage=3)
    verify_checkpoint(target)
    write_tensors({"a": torch.zeros(1)}, target / layout.state(7), read_record(target).origin)
    write_manifest(target)
    with pytest.raises(CheckpointError, match=layout.state(1)):
        verify_checkpoint(target)


def test_it_may_have_any_name_and_notes_beside_it(whole: Path) -> None:
    (whole / "NOTES").write_text("the good one")
    (whole / ".nfs0001").touch()
    verify_checkpoint(whole)
    verify_checkpoint(whole.rename(whole.parent / "best"))


def stray_state(path: Path) -> str:
    write_tensors({"a": torch.zeros(1)}, path / layout.state(0), read_record(path).origin)
    return layout.state(0)


def listed_state(path: Path) -> str:
    stray_state(path)
    write_manifest(path)
    return OPTIMIZER  # which nobody writes beside it


def other_rank(path: Path) -> str:
    name = "mp_rank_01_model_states.pt"
    shutil.copy(path / MODEL, path / name)
    return name


def listed_rank(path: Path) -> str:
    name = other_rank(path)
    write_manifest(path)
    return name


def lost_shard(path: Path) -> str:
    (path / OPTIMIZER).unlink()
    return OPTIMIZER


def unlisted_shard(path: Path) -> str:
    lost_shard(path)
    write_manifest(path)
    shutil.copy(checkpoint("relora", 2) / OPTIMIZER, path)
    return OPTIMIZER


def link(path: Path) -> str:
    (path / MODEL).rename(path.parent / "elsewhere")
    (path / MODEL).symlink_to(path.parent / "elsewhere")
    return MODEL


def pipe(path: Path) -> str:
    (path / MODEL).unlink()
    os.mkfifo(path / MODEL)
    return MODEL


def folder(path: Path) -> str:
    (path / OPTIMIZER).unlink()
    (path / OPTIMIZER).mkdir()
    return OPTIMIZER


def no_manifest(path: Path) -> str:
    (path / layout.MANIFEST).unlink()
    return layout.MANIFEST


FILES = (
    *(stray_state, listed_state, other_rank, listed_rank, lost_shard, unlisted_shard),
    *(link, pipe, folder, no_manifest),
)


@pytest.mark.parametrize("change", FILES, ids=lambda change: change.__name__)
def test_files_that_are_not_those_of_the_run(whole: Path, change: Callable[[Path], str]) -> None:
    name = change(whole)
    with pytest.raises(CheckpointError, match=f"step_5/{name}") as caught:
        verify_checkpoint(whole)
    assert "\n" not in str(caught.value)


MANIFESTS = {
    "a list": "[]",
    "null": "null",
    "no entry": '{"files": {"a": null}}',
    "empty entry": '{"files": {"a": {}}}',
    "nothing": '{"files": {}}',
    "more": '{"files": {}, "code": 1}',
    "text for a number": '{"files": {"a": {"bytes": "1", "sha256": "00"}}}',
    "deep": '{"files": ' + "[" * 100_000,
    "above": json.dumps({"files": {"../a": {"bytes": 1, "sha256": "0" * 64}}}),
    "absolute": json.dumps({"files": {"/etc/shadow": {"bytes": 1, "sha256": "0" * 64}}}),
    "itself": json.dumps({"files": {layout.MANIFEST: {"bytes": 1, "sha256": "0" * 64}}}),
    "huge": " " * (17 << 20),
}


@pytest.mark.parametrize("content", MANIFESTS)
def test_damaged_manifests(whole: Path, content: str) -> None:
    (whole / layout.MANIFEST).write_text(MANIFESTS[content])
    with pytest.raises(CheckpointError, match=f"{layout.MANIFEST}: cannot be read"):
        verify_checkpoint(whole)


DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "another step": {"step": 4, "tokens": 256},
    "far away": {"step": 10**9, "tokens": 64 * 10**9},
    "before the start": {"step": -1},
    "another place in the data": {"tokens": 1},
    "another stage": {"zero_stage": 3},
    "no stage": {"zero_stage": 7},
    "more processes": {"dp_size": 2},
    "more shards": {"tp_size": 2},
    "more processes than can be counted out": {"dp_size": 10**9},
    "and at a stage whose files do not tell": {"dp_size": 10**9, "zero_stage": 0},
    "more shards than can be counted out": {"tp_size": 10**9},
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_descriptions_of_another_place(whole: Path, case: str) -> None:
    edited(whole, **DESCRIPTIONS[case])
    write_manifest(whole)
    with pytest.raises(CheckpointError, match="step_5"):
        verify_checkpoint(whole)


def test_a_step_that_the_run_does_not_have(whole: Path) -> None:
    edited(whole, step=500, tokens=500 * 64)
    moved = whole.rename(whole.parent / "step_500")
    write_manifest(moved)
    with pytest.raises(CheckpointError, match="which goes from step 1 to 8"):
        verify_checkpoint(moved)


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, layout.side("")])
@pytest.mark.parametrize(
    "change", [None, {"file": "other"}, {"step": "4"}, {"run": "0" * 64}, {}, "x"], ids=str
)
def test_files_of_another_step_or_name_or_run(whole: Path, name: str, change: object) -> None:
    """With a manifest that was written anew."""
    path, origin = whole / name, read_record(whole).origin
    own = {"file": name, "step": "5", "run": origin.run}
    if path.suffix == ".pt":
        content = read_shard(path)
        del content[KEY]
        full = {**own, **change} if isinstance(change, dict) else change
        torch.save(content if change is None else {**content, KEY: full}, path)
    else:
        full = {**own, **change} if isinstance(change, dict) else {}
        tensors = {key: value.clone() for key, value in load_file(path).items()}  # no view of it
        write_safetensors(path, tensors, full)
    write_manifest(whole)
    if change == {}:
        verify_checkpoint(whole)
        return
    with pytest.raises(CheckpointError, match=f"step_5/{name}: .* were mixed"):
        verify_checkpoint(whole)


def test_the_same_step_of_a_run_with_another_seed(whole: Path) -> None:
    """Same names, shapes and step; only what the runs say of themselves differs."""
    record = read_record(whole)
    train = record.config.train.model_copy(update={"seed": record.config.train.seed + 1})
    other = replace(record, config=record.config.model_copy(update={"train": train}), run="")
    assert other.origin.run != record.origin.run
    path = whole / OPTIMIZER
    torch.save({**read_shard(path), KEY: stamp(OPTIMIZER, other.origin)}, path)
    write_manifest(whole)
    with pytest.raises(CheckpointError, match=f"{OPTIMIZER}: was written by another run"):
        verify_checkpoint(whole)


def test_a_format_without_stamps_does_not_excuse_todays(whole: Path) -> None:
    shutil.copy(checkpoint("relora", 1) / MODEL, whole / MODEL)
    write_manifest(whole)
    with pytest.raises(CheckpointError, match="does not say which file"):
        verify_checkpoint(whole)


def test_work_is_shared_by_bytes() -> None:
    sizes = {"a": 10, "b": 7, "c": 6, "d": 1, "e": 0}
    listed = {name: Listed(size, "") for name, size in sizes.items()}
    parts = shares(listed, 2)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    assert sorted(sum(sizes[name] for name in part) for part in parts) == [11, 13]
    assert [len(part) for part in shares(listed, 8)].count(0) == 3
