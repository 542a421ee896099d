"""Scratch folders: gone at the end, gone after a crash, and never somebody else's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relora_ds.files import scratch
from relora_ds.files.scratch import new_directory, remove_leftovers, scratch_folder

ROOT = Path(scratch.__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from relora_ds.files.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1]), ".work-") as folder:
    (folder / "half").write_text("half")
    print(folder, flush=True)
    time.sleep(600)
"""
TWO_DAYS = 2 * 24 * 3600


@pytest.fixture
def owner(tmp_path):
    """A process that works in a scratch folder, and that folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def age(folder: Path) -> None:
    """Let everything in a folder be two days old."""
    then = time.time() - TWO_DAYS
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then, then))


def on_another_host(folder: Path) -> None:
    (folder / ".owner").write_text("elsewhere 1\n")


def test_a_folder_ends_with_its_block(tmp_path):
    with scratch_folder(tmp_path, ".work-") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
        assert folder.parent == tmp_path
    with pytest.raises(RuntimeError), scratch_folder(tmp_path, ".work-"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_only_the_dead_are_cleaned_up(tmp_path, owner):
    process, folder = owner
    age(folder)  # it takes long, and lives
    with scratch_folder(tmp_path, ".work-"):
        assert folder.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with scratch_folder(tmp_path, ".work-") as own:
        assert list(tmp_path.iterdir()) == [own]


def test_a_folder_of_another_host_goes_when_it_is_old(tmp_path, owner):
    process, folder = owner
    process.kill()
    process.wait()
    on_another_host(folder)
    remove_leftovers(tmp_path, ".work-")
    assert folder.exists()  # its lock may be invisible here
    age(folder)
    remove_leftovers(tmp_path, ".work-")
    assert not folder.exists()


def test_a_directory_appears_whole_and_touches_nothing_beside_it(tmp_path):
    target, other = tmp_path / "x" / "target", tmp_path / "x" / "target.tmp"
    other.mkdir(parents=True)
    (other / "mine").touch()
    with new_directory(target) as directory:
        (directory / "new").touch()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert sorted(path.name for path in target.parent.iterdir()) == ["target", "target.tmp"]
    assert [path.name for path in other.iterdir()] == ["mine"]


def test_a_directory_that_fails_leaves_nothing(tmp_path):
    def fill():
        with new_directory(tmp_path / "target") as directory:
            (directory / "new").touch()
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        fill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("draft", [False, True])
def test_a_folder_that_got_no_owner_goes_when_it_is_old(tmp_path, draft):
    folder = tmp_path / ".work-abc"
    folder.mkdir()
    if draft:  # killed while it was taken
        (folder / ".owner.new").touch()
    remove_leftovers(tmp_path, ".work-")
    assert folder.exists()  # just made, and not locked yet
    age(folder)
    remove_leftovers(tmp_path, ".work-")
    assert not folder.exists()


def test_a_folder_of_the_user_s_stays_whatever_its_name_and_age(tmp_path):
    folder = tmp_path / ".work-notes"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").touch()
    age(folder)
    with scratch_folder(tmp_path, ".work-"):
        pass
    assert (folder / "inner" / "file").exists()


def test_a_prefix_is_no_pattern(tmp_path, owner):
    process, folder = owner
    process.kill()
    process.wait()
    odd = tmp_path / ".[ab].left"
    folder.rename(odd)
    remove_leftovers(tmp_path, ".?*?.")
    assert odd.exists()
    remove_leftovers(tmp_path, ".[ab].")
    assert not odd.exists()


def test_files_links_and_other_names_stay(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / ".work-file").touch()
    (tmp_path / ".work-link").symlink_to(tmp_path / "kept")
    (tmp_path / ".other-abc").mkdir()
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    remove_leftovers(tmp_path, ".work-")
    assert {path.name for path in tmp_path.iterdir()} == {
        "kept",
        ".work-file",
        ".work-link",
        ".other-abc",
    }
    remove_leftovers(tmp_path / "missing", ".work-")
