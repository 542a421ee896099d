"""Documents come out as they were written, bad input is located, memory stays bounded."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from relora_ds.data import formats
from relora_ds.data.corpus import DocumentReader
from relora_ds.errors import DataError


def documents(reader: DocumentReader) -> list[str]:
    """The pieces put together again."""
    found: list[str] = []
    for piece in reader:
        found.append(piece.text) if piece.first else found.append(found.pop() + piece.text)
    return found


def record(text: object) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


TWO_RECORDS = record("one\ntwo") + b"\n" + record("three")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"one\ntwo\n\n \t\nthree", ["one\ntwo", "three"]),
        ("bom.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n", ["one\ntwo", "three"]),
        ("a.txt.gz", gzip.compress(b"one\n\ntwo", mtime=0), ["one", "two"]),
        ("a.txt.zst", zstandard.compress(b"one\n\ntwo"), ["one", "two"]),
        ("a.jsonl", TWO_RECORDS, ["one\ntwo", "three"]),
        ("bom.jsonl", b"\xef\xbb\xbf" + record("a\r\nb"), ["a\nb"]),
        ("a.jsonl.gz", gzip.compress(TWO_RECORDS, mtime=0), ["one\ntwo", "three"]),
        ("a.jsonl.zst", zstandard.compress(TWO_RECORDS), ["one\ntwo", "three"]),
        ("frames.jsonl.zst", zstandard.compress(record("a")) * 2, ["a", "a"]),
        (
            "c4-train.00000-of-01024.json.gz",
            gzip.compress(TWO_RECORDS, mtime=0),
            ["one\ntwo", "three"],
        ),
        ("A.JSONL", TWO_RECORDS, ["one\ntwo", "three"]),
        ("A.Txt.GZ", gzip.compress(b"one\n\ntwo", mtime=0), ["one", "two"]),
        ("a.json", TWO_RECORDS, ["one\ntwo", "three"]),
        ("a.jsonl.xz", lzma.compress(TWO_RECORDS), ["one\ntwo", "three"]),
        ("parts.txt.xz", lzma.compress(b"one\n") + lzma.compress(b"\ntwo"), ["one", "two"]),
        ("a.ndjson.bz2", bz2.compress(TWO_RECORDS), ["one\ntwo", "three"]),
        ("empty.jsonl", record("") + record(" \n") + record("a"), ["a"]),
    ],
)
def test_reads_documents(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    reader = DocumentReader([path])
    assert documents(reader) == expected
    assert reader.documents == len(expected)
    assert reader.position == len(content)


def test_reads_parquet_and_several_files(tmp_path: Path) -> None:
    parquet.write_table(
        pa.table({"body": ["one", "", "two"], "n": [1, 2, 3]}), tmp_path / "a.parquet"
    )
    (tmp_path / "b.jsonl").write_text('{"body": "three"}\n')
    reader = DocumentReader([tmp_path / "a.parquet", tmp_path / "b.jsonl"], text_key="body")
    assert documents(reader) == ["one", "two", "three"]
    assert reader.skipped == {"empty document": 1}


BAD_INPUT = [
    ("a.txt", b"fine\nab\xff\n", ":2:3: not UTF-8: byte 0xff"),
    ("a.txt", b"fine\n\nab\0c\n", ":3:3: NUL byte"),
    ("a.txt", "x\n".encode("utf-16"), ":1:1: not UTF-8: byte 0xff"),
    ("cut.txt", b"caf\xc3", ":1:4: not UTF-8"),
    ("a.txt.gz", gzip.compress(b"line\n" * 9999, mtime=0)[:-20], "unreadable file"),
    ("a.txt.zst", zstandard.compress(b"line\n" * 9999)[:-3], "unreadable file"),
    ("a.txt.zst", b"not compressed at all", ":1:1: unreadable file"),
    ("a.jsonl", record("a") + b'{"text": oops}\n', ":2:10: invalid JSON"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "invalid JSON"),
    ("a.jsonl", record("a") + b'{"body": "x"}\n', ":2:1: missing text key: no key 'text' in"),
    ("a.jsonl", b"[1]\n", ":1:1: missing text key: no key 'text' in list"),
    ("a.jsonl", record(7), ":1:1: text is not a string"),
    ("a.jsonl", record("nul\0"), "NUL byte"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "lone surrogate"),
    ("a.parquet", b"PAR1 and then nothing", "unreadable file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_INPUT)
def test_bad_input_is_located_or_skipped(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(DocumentReader([path]))
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    good = tmp_path / "good.txt"
    good.write_text("good")
    reader = DocumentReader([path, good], on_error="skip")
    assert documents(reader)[-1] == "good"
    assert sum(reader.skipped.values()) >= 1


def test_bad_parquet_rows(tmp_path: Path) -> None:
    rows = pa.array(["fine", None, "also"])
    bad_utf8 = pa.StringArray.from_buffers(
        1, pa.py_buffer(b"\x00\0\0\0\x02\0\0\0"), pa.py_buffer(b"a\xff")
    )
    parquet.write_table(pa.table({"text": rows}), tmp_path / "null.parquet")
    parquet.write_table(pa.table({"text": bad_utf8}), tmp_path / "bytes.parquet")
    parquet.write_table(pa.table({"other": rows}), tmp_path / "key.parquet")
    for name, message in [
        ("null", "row 2: text is not a string"),
        ("bytes", "row 1:2: not UTF-8"),
        ("key", "no column 'text' among"),
    ]:
        with pytest.raises(DataError, match=message):
            list(DocumentReader([tmp_path / f"{name}.parquet"]))
    reader = DocumentReader(sorted(tmp_path.glob("*.parquet")), on_error="skip")
    assert documents(reader) == ["fine", "also"]
    assert reader.skipped == {"missing text key": 1, "not UTF-8": 1, "text is not a string": 1}


def test_overlong_record_is_one_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "RECORD_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(record("x" * 5000) + record("short"))
    with pytest.raises(DataError, match=":1:1: record too long: more than 1000 bytes"):
        list(DocumentReader([path]))
    reader = DocumentReader([path], on_error="skip")
    assert documents(reader) == ["short"]
    assert reader.skipped == {"record too long": 1}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no input files"),
        (["missing.txt"], "does not exist"),
        (["folder.txt"], "no file of a known format"),
        (["a.csv"], r"unknown format '\.csv'; known are \.txt, \.jsonl or \.json"),
        (["a.csv.gz"], r"unknown format '\.csv\.gz'"),
        (["none/*.txt"], "no file matches"),
        (["a.parquet.gz"], "unknown format"),
        (["empty.txt", "blank.txt"], "no documents in"),
    ],
)
def test_unusable_inputs(tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text("\n \n\n")
    with pytest.raises(DataError, match=message):
        list(DocumentReader([tmp_path / name for name in names]))


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet="ab \n\u00e9\u4e2d\U0001f600", min_size=1, max_size=300), st.integers(2, 40)
)
def test_pieces_put_together_are_the_document(
    tmp_path_factory: pytest.TempPathFactory, text: str, length: int
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    path.write_bytes(record(text + "."))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "PIECE_LENGTH", length)
        pieces = list(DocumentReader([path]))
    assert "".join(piece.text for piece in pieces) == text + "."
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece.text) for piece in pieces) <= length


@pytest.mark.parametrize(
    "unit", ["many words on one line ", "line of text " * 30 + "\n", "\u4e2d", "\U0001f600"]
)
def test_memory_does_not_grow_with_a_document(tmp_path: Path, unit: str) -> None:
    path = tmp_path / "huge.txt"
    path.write_text(unit * ((4 << 20) // len(unit.encode())), encoding="utf-8")
    tracemalloc.start()
    size = sum(len(piece.text) for piece in DocumentReader([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size >= (4 << 20) // 4 - 1
    assert peak < 3 << 20


def test_directories_and_patterns_stand_for_their_files(tmp_path: Path) -> None:
    names = ("b.txt", "a.jsonl", "deep/er/c.json.gz", "README.md", ".gitattributes")
    for name in names:
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = record(name) if ".json" in name else name.encode()
        path.write_bytes(gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    whole = DocumentReader([tmp_path / "corpus"])
    assert documents(whole) == ["a.jsonl", "b.txt", "deep/er/c.json.gz"]
    for pattern in ("corpus/**/*.json.gz", "corpus/deep/*/c*", "corpus/d[e]ep"):
        assert documents(DocumentReader([tmp_path / pattern])) == ["deep/er/c.json.gz"]
    odd = tmp_path / "not [a] pattern.txt"
    odd.write_text("text")
    assert documents(DocumentReader([odd])) == ["text"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file of a known format in this directory"):
        DocumentReader([tmp_path / "empty"])


def test_keys_within_keys(tmp_path: Path) -> None:
    lines = [{"meta": {"text": "one"}}, {"meta.text": "two"}, {"meta": {"body": 1}}, {"meta": "x"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reader = DocumentReader([path], "meta.text", "skip")
    assert documents(reader) == ["one", "two"]
    assert reader.skipped == {"missing text key": 2}
    with pytest.raises(DataError, match=r"a\.jsonl:3:1: missing text key: no key 'text' in "):
        documents(DocumentReader([path], "meta.text"))
    table = pa.table({"id": [1, 2], "meta": [{"text": "one", "n": 1}, {"text": "two", "n": 2}]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert documents(DocumentReader([tmp_path / "a.parquet"], "meta.text")) == ["one", "two"]
    for missing in ("meta.body", "data.text", "id.text"):
        with pytest.raises(DataError, match="missing text key"):
            documents(DocumentReader([tmp_path / "a.parquet"], missing))


@pytest.mark.parametrize("cut", [200, 1])
def test_cut_xz_is_reported(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(lzma.compress(b"".join(record(f"{n} {n * n}") for n in range(3000)))[:-cut])
    with pytest.raises(DataError, match="unreadable file: the file is damaged or cut short"):
        documents(DocumentReader([path]))


@pytest.mark.parametrize("before", range(formats.PIECE_LENGTH - 2, formats.PIECE_LENGTH + 3))
@pytest.mark.parametrize("filler", ["x", "\u00e9"])
def test_a_line_end_is_never_cut(tmp_path: Path, before: int, filler: str) -> None:
    text = filler * before + "\r\n" + filler * 10 + "\r\nlast\r\n"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert documents(DocumentReader([path])) == [text.replace("\r\n", "\n").removesuffix("\n")]


def test_pieces_end_where_a_line_begins_with_a_word() -> None:
    text = "a\n" * (formats.PIECE_LENGTH // 2 - 20) + "b\n\n   c" + "d" * 100
    at = formats._cut_position(text)
    assert text[at - 2 : at + 1] == "a\nb"
