"""Data sets of Hugging Face's as input; one sentence where the package is not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from relora_ds.cli.prepare_data import main
from relora_ds.data.ingest.hub import HubTexts
from relora_ds.data.prepare import prepare, prepare_texts
from relora_ds.data.tokenizer import Tokenizer
from relora_ds.data.tokens import TokenFile
from relora_ds.errors import DataError

ROWS = [{"meta": {"text": f"cat {n} and the fox"}, "other": n} for n in range(40)]


@pytest.fixture
def package() -> Any:
    return pytest.importorskip("datasets")


@pytest.fixture
def saved(package: Any, tmp_path: Path) -> Path:
    """A data set on the disk with a split for training and a smaller one."""
    splits = {"train": ROWS, "test": ROWS[:3]}
    whole = {name: package.Dataset.from_list(rows) for name, rows in splits.items()}
    package.DatasetDict(whole).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def as_files(rows: list[dict[str, Any]], tokenizer: Tokenizer, folder: Path) -> bytes:
    """Ids of the same texts, read from JSON Lines."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([folder / "rows.jsonl"], tokenizer.path, folder / "files", text_key="meta.text")
    return (folder / "files.bin").read_bytes()


def test_a_saved_data_set(saved: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    expected = as_files(ROWS, tokenizer, tmp_path)
    seen: list[tuple[int, int | None]] = []
    for workers in (1, 2):
        prepare_texts(
            HubTexts(str(saved), None, None, "meta.text", "fail"),
            tokenizer.path,
            tmp_path / "rows",
            lambda done, total: seen.append((done, total)),
            workers,
        )
        assert (tmp_path / "rows.bin").read_bytes() == expected
        assert seen[-1] == (40, 40)
    metadata = TokenFile(tmp_path / "rows").metadata
    assert metadata is not None
    assert metadata.sources[0].path == str(saved)
    assert metadata.sources[0].bytes > 0
    prepare_texts(
        HubTexts(str(saved), None, "test", "meta.text", "fail"), tokenizer.path, tmp_path / "test"
    )
    assert TokenFile(tmp_path / "test").num_documents == 3


def test_a_stream(package: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    texts = HubTexts(str(tmp_path / "hub"), None, None, "meta.text", "fail")
    assert texts.total is None
    prepare_texts(texts, tokenizer.path, tmp_path / "stream", workers=2)
    assert (tmp_path / "stream.bin").read_bytes() == as_files(ROWS, tokenizer, tmp_path)


def test_rows_that_cannot_be_used(package: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    package.Dataset.from_dict({"text": ["a", None, "b\0", "", "c"]}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"/d:row 2: text is not a string"):
        prepare_texts(
            HubTexts(str(tmp_path / "d"), None, None, "text", "fail"),
            tokenizer.path,
            tmp_path / "x",
        )
    report = prepare_texts(
        HubTexts(str(tmp_path / "d"), None, None, "text", "skip"), tokenizer.path, tmp_path / "x"
    )
    assert report.num_documents == 2
    assert report.skipped == {"NUL byte": 1, "empty document": 1, "text is not a string": 1}


def test_what_is_not_there_is_named(saved: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"saved: no split 'valid'; it has test, train"):
        HubTexts(str(saved), None, "valid", "text", "fail")
    texts = HubTexts(str(saved), None, None, "text", "fail")
    with pytest.raises(
        DataError, match=r"no column 'text' among \['meta', 'other'\]; .* --text-key"
    ):
        prepare_texts(texts, tokenizer.path, tmp_path / "x")
    with pytest.raises(DataError, match=r"nowhere/at_all: cannot be opened as a data set"):
        HubTexts(f"{tmp_path}/nowhere/at_all", None, None, "text", "fail")


def test_the_command_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    rest = ["--tokenizer", str(tokenizer.path), "--output", str(tmp_path / "x")]
    assert main(["--dataset", "some/set", *rest]) == 3
    words = "error: some/set: reading a data set needs the package datasets: pip install datasets\n"
    assert capsys.readouterr().err == words
    for wrong in (
        ["--dataset", "some/set", "--input", "a.txt"],
        ["--input", "a.txt", "--split", "test"],
        ["--input", "a.txt", "--workers", "0"],
    ):
        with pytest.raises(SystemExit) as caught:
            main([*wrong, *rest])
        assert caught.value.code == 2
    assert not [*tmp_path.iterdir()]
