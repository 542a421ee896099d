"""Files and directories that are on disk before anybody is told of them."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch

from relora_ds.files.durable import OutputFile, describe, exchange, remove, write_file


def test_what_was_written_is_known(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000  # more than one chunk
    written = write_file(tmp_path / "a", lambda file: file.write(content))
    assert (tmp_path / "a").read_bytes() == content
    assert written.bytes == len(content)
    assert written.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(("number", "named"), [(errno.ENOSPC, "to"), (errno.ENOENT, "from")])
def test_a_copy_that_does_not_fit_names_where_it_goes(number: int, named: str) -> None:
    error = OSError(number, os.strerror(number), "from", None, "to")
    assert describe(error) == f"{named}: {os.strerror(number)}"


def test_a_system_that_writes_less_than_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.write
    monkeypatch.setattr(os, "write", lambda file, content: original(file, content[:7]))
    written = write_file(tmp_path / "a", lambda file: file.write(b"abc" * 10))
    assert (tmp_path / "a").read_bytes() == b"abc" * 10
    assert written.sha256 == hashlib.sha256(b"abc" * 10).hexdigest()


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    write_file(tmp_path / "a", lambda file: file.write(b""))
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("at", range(1, 6))
def test_a_library_does_not_hide_what_the_system_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    calls, original = [], os.write

    def write(file: int, content: bytes) -> int:
        calls.append(file)
        if len(calls) >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(file, content)

    monkeypatch.setattr(os, "write", write)
    path = tmp_path / "shard.pt"
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_file(path, lambda file: torch.save({"x": torch.ones(9)}, file))  # pyright: ignore
    assert describe(caught.value) == f"{path}: No space left on device"


def test_progress_may_end_the_writing(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError):
        write_file(tmp_path / "a", lambda file: file.write(b"abc"), stop)


def test_a_closed_file_stays_closed(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "a")
    file.close()
    file.close()


def test_directories_change_places(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"of_{name}").touch()
    if not exchange(tmp_path / "one", tmp_path / "two"):
        pytest.skip("this file system cannot")
    assert (tmp_path / "one" / "of_two").exists()
    assert not exchange(tmp_path / "one", tmp_path / "nothing")


def test_removing_a_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    remove(tmp_path / "link")
    remove(tmp_path / "link")
    assert (tmp_path / "real").is_dir()
    assert not (tmp_path / "link").is_symlink()
