"""Finding checkpoints: only complete ones count, and the right one is the newest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from relora_ds.checkpoint.find import (
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    named_by_latest,
)
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import is_complete
from relora_ds.errors import CheckpointError

Place = Callable[..., Path]


@pytest.mark.parametrize("given", ["", layout.CHECKPOINTS, f"{layout.CHECKPOINTS}/step_5"])
def test_found_from_wherever_one_points(tmp_path: Path, place: Place, given: str) -> None:
    path = place(tmp_path / layout.CHECKPOINTS, 5, latest=True)
    assert find_checkpoint(tmp_path / given) == path


def test_nothing_to_find(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert list_checkpoints(tmp_path / "nowhere") == []
    with pytest.raises(CheckpointError, match="no checkpoint here; give a directory step_N"):
        find_checkpoint(tmp_path)


LATEST: dict[str, tuple[bytes, str]] = {
    "gone": (b"step_9", "names 'step_9'"),
    "unfinished": (b"step_5.tmp", "is damaged"),
    "elsewhere": (b"../elsewhere", "is damaged"),
    "absolute": (b"/etc", "is damaged"),
    "empty": (b"", "is damaged"),
    "no text": (b"\xff\x00", "is damaged"),
    "long": (b"step_5" * 1000, "is damaged"),
}


@pytest.mark.parametrize("case", LATEST)
def test_latest_names_something_else(tmp_path: Path, place: Place, case: str) -> None:
    content, words = LATEST[case]
    whole = place(tmp_path, 5)
    (tmp_path / layout.LATEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        latest_checkpoint(tmp_path)
    assert f"checkpoint.resume={whole}" in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "link to nothing"])
def test_latest_is_no_file(tmp_path: Path, place: Place, kind: str) -> None:
    whole, pointer = place(tmp_path, 5), tmp_path / layout.LATEST
    if kind == "directory":
        pointer.mkdir()
    elif kind == "pipe":
        os.mkfifo(pointer)
    elif kind == "link to nothing":
        pointer.symlink_to(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=f"{layout.LATEST}: is ") as caught:
        latest_checkpoint(tmp_path)
    assert f"checkpoint.resume={whole}" in str(caught.value)
    assert "checkpoint.fallback=true" in str(caught.value)


def test_latest_without_any_checkpoint(tmp_path: Path) -> None:
    (tmp_path / layout.LATEST).write_text("step_5")
    with pytest.raises(CheckpointError, match=r"start anew with checkpoint\.resume=false"):
        latest_checkpoint(tmp_path)


def test_listed_by_step_whatever_the_order_of_names(tmp_path: Path, place: Place) -> None:
    paths = [place(tmp_path, step) for step in (10, 9, 100)]
    assert list_checkpoints(tmp_path) == [paths[1], paths[0], paths[2]]


def no_manifest(path: Path) -> None:
    (path / layout.MANIFEST).unlink()


def lost_file(path: Path) -> None:
    (path / layout.side("")).unlink()


def cut_file(path: Path) -> None:
    (path / layout.TRAINER).write_text("{}")


def other_step(path: Path) -> None:
    path.rename(path.with_name("other"))
    shutil.copytree(path.with_name("step_5"), path)


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


@pytest.mark.parametrize("damage", [no_manifest, lost_file, cut_file, other_step, empty, file])
def test_what_has_the_name_of_a_checkpoint_without_being_one(
    tmp_path: Path, place: Place, damage: Callable[[Path], None]
) -> None:
    first, stray = place(tmp_path, 5), place(tmp_path, 99)
    damage(stray)
    assert list_checkpoints(tmp_path) == [first]
    assert is_complete(first)


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"step_5\n", "step_5"), (b"", None), (b"\xff\xfe", None), (b"../step_5", None)],
)
def test_what_latest_says_is_read_without_trust(
    tmp_path: Path, content: bytes, name: str | None
) -> None:
    assert named_by_latest(tmp_path) is None
    (tmp_path / layout.LATEST).write_bytes(content)
    assert named_by_latest(tmp_path) == name
    (tmp_path / layout.LATEST).write_bytes(b"step_5" + b"0" * 10_000)
    assert len(named_by_latest(tmp_path) or "") < 200
