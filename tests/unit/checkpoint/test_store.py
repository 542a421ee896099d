"""A directory of checkpoints: each is complete or absent, and the right one is found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from relora_ds.checkpoint import store
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import verify_manifest
from relora_ds.checkpoint.format.record import RunRecord, read_record
from relora_ds.checkpoint.format.tensors import read_tensors
from relora_ds.checkpoint.store import (
    CheckpointStore,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
)
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import CheckpointError
from relora_ds.parallel.topology import Topology
from tests.golden.make_checkpoint import checkpoint

TENSORS = {"pairs": torch.arange(3)}


class Engine(SimpleNamespace):
    """What saving needs of an engine whose optimizer has no clocks and no matrices; it writes
    one shard."""

    fails = False

    def __init__(self) -> None:
        matrices = SimpleNamespace(side_tensors=dict, side_slices=dict)
        unsliced = SimpleNamespace(weights_sharded=False)
        super().__init__(clocks={}, bases={}, matrices=matrices, layout=unsliced)

    def names(self) -> dict[Any, str]:
        return {}

    def save(self, directory: str, tag: str) -> None:
        folder = Path(directory, tag)
        folder.mkdir()
        (folder / "mp_rank_00_model_states.pt").write_bytes(b"weights")
        for name in layout.SCRIPTS:
            (Path(directory) / name).write_text("raise SystemExit")
        if self.fails:
            raise OSError("no space left on device")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no other processes to wait for."""
    monkeypatch.setattr(store, "barrier", lambda: None)


@pytest.fixture
def record() -> RunRecord:
    return read_record(checkpoint("relora", 1))


def after(record: RunRecord, step: int) -> RunRecord:
    return replace(record, trainer=record.trainer.model_copy(update={"step": step}))


def make_store(directory: Path, keep: int | None = None) -> CheckpointStore:
    return CheckpointStore(directory, keep, Topology(0, 1, 0, torch.device("cpu")))


def save(
    checkpoints: CheckpointStore,
    record: RunRecord,
    step: int,
    engine: Engine | None = None,
    tokenizer: Path | None = None,
) -> Path:
    live = cast(TrainEngine, engine or Engine())
    return checkpoints.save(live, after(record, step), TENSORS, tokenizer)


def files(directory: Path) -> Iterator[str]:
    yield from sorted(path.name for path in directory.iterdir())


def test_what_a_checkpoint_consists_of(tmp_path: Path, record: RunRecord) -> None:
    tokenizer = tmp_path / "any_name"
    tokenizer.write_bytes(b"pieces")
    checkpoints = tmp_path / "run" / layout.CHECKPOINTS
    path = save(make_store(checkpoints), record, 7, tokenizer=tokenizer)
    assert path == checkpoints / "step_7"
    assert list(files(checkpoints)) == [layout.LATEST, "step_7"]
    assert list(files(path)) == sorted(
        [
            "mp_rank_00_model_states.pt",
            layout.TRAINER,
            layout.RUN,
            layout.MODEL,
            layout.TOKENIZER,
            layout.MANIFEST,
            layout.side(""),
            layout.method(""),
        ]
    )
    verify_manifest(path)
    assert read_record(path) == after(record, 7)
    assert torch.equal(read_tensors(path / layout.method(""))["pairs"], TENSORS["pairs"])
    assert (path / layout.TOKENIZER).read_bytes() == b"pieces"


def test_an_interrupted_save_leaves_the_one_before(tmp_path: Path, record: RunRecord) -> None:
    checkpoints = make_store(tmp_path)
    first, failing = save(checkpoints, record, 5), Engine()
    failing.fails = True
    with pytest.raises(OSError, match="no space left"):
        save(checkpoints, record, 10, failing)
    assert list_checkpoints(tmp_path) == [first]
    assert latest_checkpoint(tmp_path) == first
    assert len(layout.leftovers(tmp_path)) == 1
    last = save(checkpoints, record, 10)
    assert list_checkpoints(tmp_path) == [first, last]
    assert not layout.leftovers(tmp_path)


def test_the_oldest_give_way(tmp_path: Path, record: RunRecord) -> None:
    checkpoints = make_store(tmp_path, keep=2)
    paths = [save(checkpoints, record, step) for step in (9, 10, 11)]
    assert list_checkpoints(tmp_path) == paths[1:]
    assert latest_checkpoint(tmp_path) == paths[2]


def test_the_same_step_again_takes_the_place(tmp_path: Path, record: RunRecord) -> None:
    checkpoints = make_store(tmp_path, keep=2)
    save(checkpoints, record, 5)
    later = save(checkpoints, record, 10)
    (later / "of_before").touch()
    assert save(checkpoints, record, 10) == later
    assert not (later / "of_before").exists()
    assert list(files(tmp_path)) == [layout.LATEST, "step_10", "step_5"]


@pytest.mark.parametrize("given", ["", layout.CHECKPOINTS, f"{layout.CHECKPOINTS}/step_5"])
def test_found_from_wherever_one_points(tmp_path: Path, record: RunRecord, given: str) -> None:
    path = save(make_store(tmp_path / layout.CHECKPOINTS), record, 5)
    assert find_checkpoint(tmp_path / given) == path


def test_nothing_to_find(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert list_checkpoints(tmp_path / "nowhere") == []
    with pytest.raises(CheckpointError, match="no checkpoint here; give a directory step_N"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["step_9", "step_5.tmp", "../elsewhere", ""])
def test_latest_names_something_else(tmp_path: Path, record: RunRecord, name: str) -> None:
    save(make_store(tmp_path), record, 5)
    (tmp_path / layout.LATEST).write_text(name)
    with pytest.raises(CheckpointError, match=f"names {name!r}, .*; resume from step_5"):
        latest_checkpoint(tmp_path)
