"""A written checkpoint gets its name whole, or the one before stays; failures leave no rubbish."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from relora_ds.checkpoint.find import latest_checkpoint, named_by_latest
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import check_file, is_complete, read_manifest
from relora_ds.checkpoint.saving import publish as publishing
from relora_ds.checkpoint.saving.publish import begin, discard, give_up, point_to, publish
from relora_ds.files.durable import Written, write_file

Place = Callable[..., Path]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write(staging: Path, content: bytes = b"weights") -> dict[str, Written]:
    begin(staging)
    return {"a.pt": write_file(staging / "a.pt", lambda file: file.write(content))}


@pytest.mark.parametrize("left", ["nothing", "file", "directory", "link"])
def test_a_save_begins_empty_whatever_was_left(left: str, tmp_path: Path) -> None:
    staging, elsewhere = tmp_path / "checkpoints" / "step_5.tmp", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    if left != "nothing":
        staging.parent.mkdir()
    if left == "file":
        staging.touch()
    elif left == "directory":
        (staging / "half").mkdir(parents=True)
    elif left == "link":
        staging.symlink_to(elsewhere)
    begin(staging)
    assert staging.is_dir()
    assert not staging.is_symlink()
    assert names(staging) == []
    assert names(elsewhere) == ["kept"]


def test_a_published_checkpoint_is_complete_and_the_latest(tmp_path: Path) -> None:
    final = tmp_path / "step_5"
    publish(layout.staging(final), final, write(layout.staging(final)))
    assert names(tmp_path) == [layout.LATEST, "step_5"]
    assert latest_checkpoint(tmp_path) == final
    for name, listed in read_manifest(final).items():
        check_file(final / name, listed)


@pytest.mark.parametrize("complete", [True, False])
def test_what_has_its_name_moves_aside(complete: bool, tmp_path: Path) -> None:
    final = tmp_path / "step_5"
    if complete:
        publish(layout.staging(final), final, write(layout.staging(final), b"before"))
    else:
        final.mkdir()
        (final / "notes").write_text("of a user")
        layout.stray(final).mkdir()
    publish(layout.staging(final), final, write(layout.staging(final)))
    assert (final / "a.pt").read_bytes() == b"weights"
    strays = [] if complete else ["step_5.stray", "step_5.stray_1"]
    assert names(tmp_path) == [layout.LATEST, "step_5", *strays]
    if not complete:
        assert (tmp_path / "step_5.stray_1" / "notes").read_text() == "of a user"


def test_a_refused_rename_puts_back_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "step_5"
    staging = layout.staging(final)
    publish(staging, final, write(staging, b"before"))
    files, rename = write(staging), Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == staging:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Read-only"):
        publish(staging, final, files)
    assert is_complete(final)
    assert (final / "a.pt").read_bytes() == b"before"
    give_up(staging)
    assert names(tmp_path) == [layout.LATEST, "step_5"]
    assert latest_checkpoint(tmp_path) == final


def test_giving_up_says_what_it_cannot_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(publishing, "remove", refuse)
    give_up(tmp_path / "step_5.tmp")
    said = [record.getMessage() for record in caplog.records]
    assert [Path(text.split()[0]).name for text in said] == ["step_5.tmp", "latest.tmp"]


def test_a_pointer_that_cannot_be_written_leaves_latest(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = place(tmp_path, 5)
    place(tmp_path, 10, latest=True)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(PermissionError):
            point_to(older)
    assert named_by_latest(tmp_path) == "step_10"
    assert names(tmp_path) == [layout.LATEST, "step_10", "step_5"]
    point_to(older)
    assert named_by_latest(tmp_path) == "step_5"


def test_a_half_removed_checkpoint_has_no_name_of_one(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    going, remove = place(tmp_path, 5), publishing.remove

    def stop_half_way(path: Path) -> None:
        if path.exists():
            (path / layout.MODEL).unlink()
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "remove", stop_half_way)
        discard(going)
    assert names(tmp_path) == ["step_5.stale"]
    assert "cannot be removed" in caplog.text
    discard(tmp_path / "step_5.stale")
    assert names(tmp_path) == []
