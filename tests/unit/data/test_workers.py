"""Several processes write what one would, say what one would, and leave nothing behind."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from relora_ds.data.formats import PIECE_LENGTH, Piece
from relora_ds.data.ingest import texts
from relora_ds.data.prepare import prepare, prepare_texts
from relora_ds.data.token_files.metadata import SourceFile
from relora_ds.data.tokenizer import Tokenizer
from relora_ds.errors import DataError

SUFFIXES = (".bin", ".idx", ".json")
WAIT_S = 60


@pytest.fixture(autouse=True)
def one_share_for_every_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_SHARE_BYTES", 1)
    monkeypatch.setattr(texts, "_SHARES_PER_WORKER", 1 << 30)


def records(*documents: str) -> bytes:
    return "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of every kind: with a long document, with faults, without a document."""
    found = tmp_path / "texts"
    found.mkdir()
    (found / "a.txt").write_text("one more fox\nand a dog\n" * (PIECE_LENGTH // 10) + "\n\nshort\n")
    (found / "b.jsonl.gz").write_bytes(gzip.compress(records("a cat", "", "a wall", "a fox")))
    (found / "c.jsonl").write_bytes(b"oops\n" + records("", ""))
    (found / "d.jsonl").write_bytes(records("über", "the quick brown fox " * 40) + b"[1]\n")
    (found / "e.txt").write_text("")
    (found / "f.json").write_bytes(records(*(f"cat {n} on the wall" for n in range(300))))
    return found


def test_the_same_files_byte_by_byte(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    for workers, prefix in ((1, "one"), (2, "two")):
        seen.clear()
        prepare(
            [folder],
            tokenizer.path,
            tmp_path / prefix,
            on_error="skip",
            progress=lambda done, total: seen.append((done, total)),
            workers=workers,
        )
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert seen[-1] == (size, size)
    for suffix in SUFFIXES:
        one, two = (tmp_path / f"{prefix}{suffix}" for prefix in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        f"{prefix}{suffix}" for prefix in ("one", "two") for suffix in SUFFIXES
    }


def test_the_first_fault_in_order_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    slow = records(*("a long text of cats and foxes " * 50 for _ in range(3000)))
    (tmp_path / "a.jsonl").write_bytes(slow + b'{"text": "fox"} dog\n')
    (tmp_path / "b.jsonl").write_bytes(b"{\n")
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"a\.jsonl:3001:17: invalid JSON: Extra data"):
            prepare([tmp_path], tokenizer.path, tmp_path / "out" / "x", workers=workers)
        assert not [*(tmp_path / "out").iterdir()]


def test_nothing_but_faults(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(b"oops\n")
    words = r"no documents in .*a\.jsonl, .*b\.jsonl; left out: {'invalid JSON': 2}"
    with pytest.raises(DataError, match=words):
        prepare([tmp_path], tokenizer.path, tmp_path / "x", on_error="skip")


@dataclass(frozen=True)
class Endless:
    """Documents without an end, which say who reads them; or the end of the reader."""

    notes: Path
    ends_reader: bool = False
    position: int = 0

    def __str__(self) -> str:
        return "endless"

    @property
    def skipped(self) -> dict[str, int]:
        return {}

    @property
    def total(self) -> None:
        return None

    def shares(self, workers: int) -> list[Endless]:
        return [self] * workers

    def sources(self) -> tuple[SourceFile, ...]:
        return ()

    def open(self) -> Endless:
        if self.ends_reader:
            os.kill(os.getpid(), signal.SIGKILL)
        return self

    def pieces(self) -> Iterator[Piece]:
        Path(self.notes, str(os.getpid())).touch()
        while True:
            yield Piece("a cat and a fox on the wall " * 100, first=True, last=True)


def test_a_killed_worker_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"endless: the worker that read it was ended by SIGKILL"):
        prepare_texts(Endless(tmp_path, True), tokenizer.path, tmp_path / "x", workers=2)
    assert not [*tmp_path.iterdir()]


def test_a_killed_parent_leaves_no_worker_and_nothing_that_opens(
    tokenizer: Tokenizer, text_file: Path, tmp_path: Path
) -> None:
    notes, out = tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    parent = multiprocessing.get_context("spawn").Process(
        target=prepare_texts, args=(Endless(notes), tokenizer.path, out / "x", None, 2)
    )
    parent.start()
    until(lambda: len([*notes.iterdir()]) == 2)
    parent.kill()
    parent.join()
    workers = [int(path.name) for path in notes.iterdir()]
    until(lambda: not any(is_alive(pid) for pid in workers))
    assert [path.name[:9] for path in out.iterdir()] == [".prepare-"]
    prepare([text_file], tokenizer.path, out / "x")
    assert sorted(path.name for path in out.iterdir()) == ["x.bin", "x.idx", "x.json"]


def until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
