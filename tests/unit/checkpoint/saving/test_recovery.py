"""What killed saves leave, and which checkpoints stay: `latest` always names a complete one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from relora_ds.checkpoint.find import latest_checkpoint, list_checkpoints, named_by_latest
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.saving.recovery import recover
from relora_ds.checkpoint.saving.retention import abandon_later, prune

Place = Callable[..., Path]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def two(tmp_path: Path, place: Place) -> tuple[Path, Path]:
    """Steps 5 and 10, the latter the latest."""
    return place(tmp_path, 5), place(tmp_path, 10, latest=True)


def test_nothing_to_recover(tmp_path: Path, two: tuple[Path, Path]) -> None:
    recover(tmp_path / "nowhere")
    recover(tmp_path)
    assert names(tmp_path) == [layout.LATEST, "step_10", "step_5"]


def test_unfinished_and_half_removed_ones_go(tmp_path: Path, two: tuple[Path, Path]) -> None:
    (tmp_path / "step_15.tmp").mkdir()
    (tmp_path / "step_15.tmp" / "half").touch()
    (tmp_path / "step_20.tmp").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step_25.tmp").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "step_1.stale").mkdir()
    (tmp_path / "latest.tmp").write_bytes(b"\xff")
    recover(tmp_path)
    assert names(tmp_path) == ["elsewhere", layout.LATEST, "step_10", "step_5"]


def test_killed_before_the_rename(tmp_path: Path, place: Place) -> None:
    place(tmp_path, 5, latest=True)
    newer = place(tmp_path, 10)
    newer.rename(layout.staging(newer))
    (tmp_path / "latest.tmp").write_text("step_10")  # all ranks had agreed
    recover(tmp_path)
    assert latest_checkpoint(tmp_path) == newer
    assert names(tmp_path) == [layout.LATEST, "step_10", "step_5"]


def test_killed_between_the_rename_and_latest(tmp_path: Path, place: Place) -> None:
    place(tmp_path, 5, latest=True)
    newer = place(tmp_path, 10)
    (tmp_path / "latest.tmp").write_text("step_10")
    recover(tmp_path)
    assert latest_checkpoint(tmp_path) == newer


def test_a_latest_that_the_user_set_back_is_obeyed(tmp_path: Path, two: tuple[Path, Path]) -> None:
    (tmp_path / layout.LATEST).write_text("step_5")
    recover(tmp_path)
    assert latest_checkpoint(tmp_path) == two[0]


def test_an_announcement_of_what_is_not_complete(tmp_path: Path, two: tuple[Path, Path]) -> None:
    (tmp_path / "step_15.tmp").mkdir()
    (tmp_path / "latest.tmp").write_text("step_15")
    recover(tmp_path)
    assert names(tmp_path) == [layout.LATEST, "step_10", "step_5"]
    assert latest_checkpoint(tmp_path) == two[1]


@pytest.mark.parametrize("form", [layout.staging, layout.stale])
def test_killed_while_a_step_took_its_own_place(
    tmp_path: Path, two: tuple[Path, Path], form: Callable[[Path], Path]
) -> None:
    two[1].rename(form(two[1]))
    recover(tmp_path)
    assert latest_checkpoint(tmp_path) == two[1]
    assert names(tmp_path) == [layout.LATEST, "step_10", "step_5"]


def test_the_newest_stays_whatever_is_kept(tmp_path: Path, place: Place) -> None:
    paths = [place(tmp_path, step) for step in (5, 10, 15)]
    prune(paths[2], 1)
    assert list_checkpoints(tmp_path) == [paths[2]]


def test_later_ones_do_not_count(tmp_path: Path, place: Place) -> None:
    paths = [place(tmp_path, step) for step in (5, 10, 15)]
    prune(paths[1], 2)
    assert list_checkpoints(tmp_path) == paths


def test_going_on_from_an_older_one(tmp_path: Path, place: Place) -> None:
    checkpoints = tmp_path / layout.CHECKPOINTS
    paths = [place(checkpoints, step, latest=True) for step in (5, 10, 15)]
    (checkpoints / "step_99").mkdir()
    moved = abandon_later(checkpoints, paths[0], 5)
    aside = tmp_path / "previous_1" / layout.CHECKPOINTS
    assert moved == aside
    assert names(aside) == ["step_10", "step_15"]
    assert latest_checkpoint(checkpoints) == paths[0]
    assert names(checkpoints) == [layout.LATEST, "step_5", "step_99"]
    assert abandon_later(checkpoints, paths[0], 5) is None


def test_going_on_from_elsewhere(tmp_path: Path, place: Place) -> None:
    source = place(tmp_path / "other", 7)
    checkpoints = tmp_path / layout.CHECKPOINTS
    place(checkpoints, 5, latest=True)
    assert abandon_later(checkpoints, source, 7) is not None
    assert list_checkpoints(checkpoints) == []
    assert named_by_latest(checkpoints) is None
    assert abandon_later(checkpoints, source, 7) is None
