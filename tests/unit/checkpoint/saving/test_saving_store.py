"""Saving: a checkpoint is complete or absent, whatever refuses to be written at whatever moment."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from relora_ds.checkpoint.find import latest_checkpoint, list_checkpoints
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import check_file, read_manifest
from relora_ds.checkpoint.format.record import RunRecord, read_record
from relora_ds.checkpoint.format.tensors import read_tensors
from relora_ds.checkpoint.saving import task
from relora_ds.checkpoint.saving.flight import SaveResult
from relora_ds.checkpoint.saving.recovery import recover
from relora_ds.checkpoint.saving.store import CheckpointStore
from relora_ds.config.sections import CheckpointConfig
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import CheckpointError
from relora_ds.parallel.topology import Topology
from tests.golden.make_checkpoint import checkpoint

SHARD = "mp_rank_00_model_states.pt"
TENSORS = {"pairs": torch.arange(3)}


class Engine(SimpleNamespace):
    """What saving needs of an engine whose optimizer has no clocks and no matrices."""

    def __init__(self) -> None:
        matrices = SimpleNamespace(side_tensors=dict, side_slices=dict)
        unsliced = SimpleNamespace(weights_sharded=False)
        super().__init__(clocks={}, bases={}, matrices=matrices, layout=unsliced, rounds=None)
        self.weight = torch.arange(2000.0)

    def names(self) -> dict[Any, str]:
        return {}

    def shards(self) -> dict[str, Any]:
        return {SHARD: {"module": {"head": self.weight[:1000], "tail": self.weight[1000:]}}}


@dataclass
class Run:
    """A store of one process, and what it saves."""

    directory: Path
    settings: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        topology = Topology(0, 1, 0, torch.device("cpu"))
        self.store = CheckpointStore(self.directory, self.settings, topology)
        self.record: RunRecord = read_record(checkpoint("relora", 1))

    def save(self, step: int, *, last: bool = False, tokenizer: Path | None = None) -> list[Any]:
        return self.store.save(
            cast(TrainEngine, self.engine), self.after(step), TENSORS, tokenizer, last=last
        )

    def after(self, step: int) -> RunRecord:
        trainer = self.record.trainer.model_copy(update={"step": step})
        return replace(self.record, trainer=trainer)

    def saved(self, step: int) -> Path:
        [result] = self.save(step)
        assert result.path is not None
        return result.path

    def attempt(self, step: int) -> SaveResult | str:
        """A save that may fail: its result, or what is said of it."""
        try:
            return self.save(step)[0]
        except CheckpointError as error:
            return str(error)


def verify_manifest(directory: Path) -> None:
    """Every listed file is what was written."""
    for name, listed in read_manifest(directory).items():
        check_file(directory / name, listed)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / layout.CHECKPOINTS)


def test_what_a_checkpoint_consists_of(run: Run, tmp_path: Path) -> None:
    tokenizer = tmp_path / "any_name"
    tokenizer.write_bytes(b"pieces")
    [result] = run.save(7, tokenizer=tokenizer)
    assert result.path == run.directory / "step_7"
    assert names(run.directory) == [layout.LATEST, "step_7"]
    expected = [SHARD, layout.TRAINER, layout.RUN, layout.MODEL, "tokenizer.model"]
    expected += [layout.MANIFEST, layout.side(""), layout.method("")]
    assert names(result.path) == sorted(expected)
    verify_manifest(result.path)
    assert read_record(result.path) == run.after(7)
    assert torch.equal(read_tensors(result.path / layout.method(""))["pairs"], TENSORS["pairs"])
    assert (result.path / "tokenizer.model").read_bytes() == b"pieces"
    module = torch.load(result.path / SHARD, weights_only=True)["module"]
    assert torch.equal(module["tail"], run.engine.weight[1000:])
    assert module["tail"].untyped_storage().nbytes() == 8000  # shared with the head, written once


def test_what_a_save_reports(run: Run) -> None:
    [result] = run.save(7)
    size = sum(file.stat().st_size for file in (run.directory / "step_7").iterdir())
    manifest = (run.directory / "step_7" / layout.MANIFEST).stat().st_size
    assert result.figures()["checkpoint/bytes"] == size - manifest
    assert result.stall_seconds == pytest.approx(result.seconds, abs=0.05)


def test_the_oldest_give_way(tmp_path: Path) -> None:
    run = Run(tmp_path, CheckpointConfig(keep=2))
    paths = [run.saved(step) for step in (9, 10, 11)]
    assert list_checkpoints(tmp_path) == paths[1:]
    assert latest_checkpoint(tmp_path) == paths[2]


def test_strays_neither_count_nor_go(tmp_path: Path) -> None:
    run = Run(tmp_path, CheckpointConfig(keep=2))
    (tmp_path / "step_99").mkdir()
    (tmp_path / "step_98").write_text("a file")
    (tmp_path / "step_2").mkdir()
    paths = [run.saved(step) for step in (9, 10, 11)]
    assert list_checkpoints(tmp_path) == paths[1:]
    assert {"step_99", "step_98", "step_2"} < set(names(tmp_path))


def test_the_same_step_again_takes_the_place(run: Run) -> None:
    run.saved(5)
    later = run.saved(10)
    (later / "of_before").touch()
    assert run.saved(10) == later
    assert not (later / "of_before").exists()
    assert names(run.directory) == [layout.LATEST, "step_10", "step_5"]


def test_what_is_no_checkpoint_makes_room_and_stays(run: Run) -> None:
    run.saved(5)
    (run.directory / "step_10").write_text("notes")
    assert run.saved(10) == latest_checkpoint(run.directory)
    assert (run.directory / "step_10.stray").read_text() == "notes"


@dataclass
class Refusal:
    """An operating system that refuses one call, counted over a save."""

    at: int
    number: int
    once: bool = True
    calls: list[str] = field(default_factory=list)

    def wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            self.calls.append(name)
            due = len(self.calls) == self.at if self.once else len(self.calls) >= self.at
            if due:
                raise OSError(self.number, os.strerror(self.number))
            return original(*arguments, **named)

        return wrapped


CALLS = ("write", "fsync", "mkdir", "rename", "replace", "open")


def refuse(monkeypatch: pytest.MonkeyPatch, at: int, number: int, once: bool = True) -> Refusal:
    refusal = Refusal(at, number, once)
    for name in CALLS:
        monkeypatch.setattr(os, name, refusal.wrap(name, getattr(os, name)))
    return refusal


def count_calls(directory: Path) -> int:
    """Calls of the operating system that a second save of a run makes."""
    run = Run(directory)
    run.saved(5)
    with pytest.MonkeyPatch.context() as patch:
        refusal = refuse(patch, -1, 0)
        run.saved(10)
    return len(refusal.calls)


def test_a_disk_that_is_full_at_any_moment(tmp_path: Path) -> None:
    total = count_calls(tmp_path / "counted")
    assert total > 30
    for at in range(1, total + 1):
        run = Run(tmp_path / f"refused_{at}" / layout.CHECKPOINTS)
        first = run.saved(5)
        with pytest.MonkeyPatch.context() as patch:
            refuse(patch, at, errno.ENOSPC)
            result = run.attempt(10)
        if isinstance(result, str):
            assert "no checkpoint of step 10 was saved: rank 0: " in result, at
            assert "No space left on device" in result, at
            assert ": free some space there, raise the quota, or keep fewer" in result, at
            assert "0 bytes" not in result, at
        assert not layout.unfinished(run.directory), at
        newest = latest_checkpoint(run.directory)
        assert newest == (first if isinstance(result, str) else result.path), at
        assert newest is not None
        verify_manifest(newest)
        assert run.saved(15) == latest_checkpoint(run.directory), at


def test_a_disk_that_turns_read_only_at_any_moment(tmp_path: Path) -> None:
    for at in range(1, count_calls(tmp_path / "counted") + 1, 3):
        run = Run(tmp_path / f"refused_{at}" / layout.CHECKPOINTS)
        first = run.saved(5)
        with pytest.MonkeyPatch.context() as patch:
            refuse(patch, at, errno.EROFS, once=False)
            result = run.attempt(10)
        if isinstance(result, str):
            assert "Read-only file system" in result, at
            assert "make the directory writable" in result, at
        recover(run.directory)
        newest = latest_checkpoint(run.directory)
        assert newest in (first, run.directory / "step_10"), at
        assert isinstance(result, str) or newest == result.path, at
        verify_manifest(newest)


def test_a_warning_and_the_next_save_tries_again(tmp_path: Path) -> None:
    run = Run(tmp_path, CheckpointConfig(on_save_error="warn"))
    first = run.saved(5)
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, 9, errno.EIO)
        [result] = run.save(10)
    assert result.path is None
    assert f"Input/output error; check that file system; {first} is complete" in result.problem
    assert list_checkpoints(tmp_path) == [first]
    assert run.saved(15) == latest_checkpoint(tmp_path)


def test_the_last_save_must_succeed(tmp_path: Path) -> None:
    run = Run(tmp_path, CheckpointConfig(on_save_error="warn"))
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, 9, errno.EIO)
        with pytest.raises(CheckpointError, match="there is no complete checkpoint yet"):
            run.save(10, last=True)


def test_an_error_of_the_program_is_not_lost(run: Run) -> None:
    def shards() -> dict[str, Any]:
        return {SHARD: {"lock": threading.Lock()}}

    run.engine.shards = shards
    with pytest.raises(CheckpointError, match="TypeError: cannot pickle"):
        run.save(5)
    assert names(run.directory) == []


class Gate:
    """Lets a background save write only when it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.event = threading.Event()
        original = task.write_file

        def write_file(*arguments: Any) -> Any:
            assert self.event.wait(20)
            return original(*arguments)

        monkeypatch.setattr(task, "write_file", write_file)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.event.set()


def until_it_ends(store: CheckpointStore) -> SaveResult:
    for _ in range(2000):
        ended = store.poll()
        if ended:
            return ended[0]
        threading.Event().wait(0.005)
    raise AssertionError("the save did not end")


def test_in_the_background_a_state_is_written_as_it_was(tmp_path: Path, gate: Gate) -> None:
    run = Run(tmp_path, CheckpointConfig(asynchronous=True))
    assert run.save(5) == []
    run.store.hold()
    run.engine.weight.zero_()
    assert run.store.poll() == []
    assert latest_checkpoint(tmp_path) is None
    gate.event.set()
    result = until_it_ends(run.store)
    assert result.path == latest_checkpoint(tmp_path)
    assert result.stall_seconds < result.seconds
    module = torch.load(tmp_path / "step_5" / SHARD, weights_only=True)["module"]
    assert torch.equal(module["head"], torch.arange(1000.0))


def test_a_background_save_writes_the_same_bytes(tmp_path: Path) -> None:
    paths = []
    for asynchronous in (False, True):
        directory = tmp_path / str(asynchronous)
        run = Run(directory, CheckpointConfig(asynchronous=asynchronous))
        run.save(5)
        run.store.finish()
        paths.append(directory / "step_5")
    assert names(paths[0]) == names(paths[1])
    assert all((paths[0] / n).read_bytes() == (paths[1] / n).read_bytes() for n in names(paths[0]))


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, gate: Gate) -> None:
    run = Run(tmp_path, CheckpointConfig(asynchronous=True))
    run.save(5)
    threading.Timer(0.2, gate.event.set).start()
    [first] = run.save(10)
    assert first.path == tmp_path / "step_5"
    assert first.stall_seconds > 0.1
    [second] = run.store.finish()
    assert second.path == latest_checkpoint(tmp_path)
    assert run.store.finish() == []


def test_a_background_save_that_fails_is_heard_of(tmp_path: Path, gate: Gate) -> None:
    run = Run(tmp_path, CheckpointConfig(asynchronous=True))
    run.save(5)
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, 3, errno.ENOSPC)
        gate.event.set()
        with pytest.raises(CheckpointError, match="no checkpoint of step 5"):
            until_it_ends(run.store)
    assert names(tmp_path) == []


def test_while_another_error_ends_the_run(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, CheckpointConfig(asynchronous=True))
    run.save(5)
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, 3, errno.ENOSPC)
        gate.event.set()
        run.store.settle()
    assert "no checkpoint of step 5" in caplog.text


def test_too_little_space_is_found_before_anything_is_written(run: Run) -> None:
    run.saved(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=100))
        with pytest.raises(CheckpointError, match=r"not enough space; .* and 100 bytes are free"):
            run.save(10)
        with pytest.raises(CheckpointError, match=r"100 bytes are free, .* free 4\.9 kB"):
            run.store.check_room(5000)
    assert not layout.unfinished(run.directory)
