"""Only regular files are opened, and only as much of them as is wanted."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from relora_ds.files.regular import open_own, open_regular, read_regular


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def unix_socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


def link_to_pipe(path: Path) -> Path:
    path.symlink_to(pipe(path.with_name("pipe")))
    return path


UNUSABLE = {
    "pipe": (pipe, "it is a pipe"),
    "link to a pipe": (link_to_pipe, "it is a pipe"),
    "socket": (unix_socket, "it is a socket"),
    "folder": (folder, "it is a directory"),
    "endless device": (lambda path: Path("/dev/zero"), "it is a device"),
    "terminal": (lambda path: Path("/dev/tty"), "it is a device"),
    "missing": (lambda path: path, "No such file"),
    "below a file": (lambda path: Path(__file__) / "x", "Not a directory"),
    "loop of links": (loop, "Too many levels"),
    "long name": (lambda path: path.with_name("x" * 300), "File name too long"),
    "NUL": (lambda path: f"{path}\0", "no file can have this name"),
    "half a surrogate pair": (lambda path: f"{path}\ud800", "no file can have this name"),
}


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.timeout(5)
def test_anything_else_is_refused_with_a_reason(tmp_path, name):
    make, reason = UNUSABLE[name]
    path = make(tmp_path / "file")
    for read in (open_regular, lambda path: read_regular(path, 10)):
        with pytest.raises(OSError, match=reason) as caught:
            read(path)
        assert reason in caught.value.strerror


def test_a_file_and_a_link_to_it_are_read(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"0123456789")
    link.symlink_to(path)
    assert read_regular(link, 10) == b"0123456789"
    with pytest.raises(OSError, match="larger than 9 bytes"):
        read_regular(path, 9)


def test_what_was_exchanged_for_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    status = Path(__file__).stat()
    monkeypatch.setattr(os, "stat", lambda name: status)  # a regular file, at the first look
    with pytest.raises(OSError, match="it is a pipe"):
        open_regular(pipe(tmp_path / "pipe"))


@pytest.mark.parametrize("name", ["pipe", "link to a pipe", "socket", "folder", "loop"])
@pytest.mark.timeout(5)
def test_nothing_else_is_written_to(tmp_path, name):
    path = (UNUSABLE | {"loop": (loop, "")})[name][0](tmp_path / "file")
    with pytest.raises(OSError, match="it is a"):
        open_own(path, os.O_RDWR)


def test_what_a_link_leads_to_is_not_written_to(tmp_path):
    others, link = tmp_path / "others", tmp_path / "link"
    others.write_text("theirs")
    for target in (others, tmp_path / "nothing"):
        link.symlink_to(target)
        with pytest.raises(OSError, match="it is a link, and may lead to a file of others"):
            open_own(link, os.O_WRONLY | os.O_TRUNC)
        link.unlink()
    assert others.read_text() == "theirs"
    assert not (tmp_path / "nothing").exists()


def test_a_link_that_appears_between_the_two_looks(tmp_path, monkeypatch):
    others, link = tmp_path / "others", tmp_path / "link"
    others.write_text("theirs")
    link.symlink_to(others)
    status = others.stat()
    monkeypatch.setattr(os, "lstat", lambda name: status)
    with pytest.raises(OSError, match="Too many levels"):
        open_own(link, os.O_WRONLY | os.O_TRUNC)
    assert others.read_text() == "theirs"


def test_own_files_are_made_and_gone_on_with(tmp_path):
    path = tmp_path / "log"
    for line in ("one\n", "two\n"):
        with open(path, "a", opener=open_own) as file:
            file.write(line)
    assert path.read_text() == "one\ntwo\n"
