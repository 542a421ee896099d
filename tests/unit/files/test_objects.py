"""JSON objects are read from files that may hold anything; whatever is none is None."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from relora_ds.files.objects import parse_object, read_object


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b"null", b"3", b'"a"', b"\xff", b"{}x", b"[" * 100_000, b"\0"]
)
def test_what_is_no_object(text: bytes, tmp_path: Path) -> None:
    assert parse_object(text) is None
    (tmp_path / "file").write_bytes(text)
    assert read_object(tmp_path / "file") is None


@pytest.mark.parametrize("text", [b"{}", b' {"a": [1, null]}\n', '{"ü": "漢"}'.encode("utf-16")])
def test_an_object(text: bytes, tmp_path: Path) -> None:
    found = parse_object(text)
    assert isinstance(found, dict)
    (tmp_path / "file").write_bytes(text)
    assert read_object(tmp_path / "file") == found


def test_a_name_that_leads_to_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("missing", "pipe", "loop", "."):
        assert read_object(tmp_path / name) is None
