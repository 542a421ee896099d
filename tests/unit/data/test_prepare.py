"""What `prepare` writes can be read by Megatron and by us, and appears whole or not at all."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from relora_ds.data import prepare as prepare_module
from relora_ds.data.formats import PIECE_LENGTH
from relora_ds.data.prepare import prepare
from relora_ds.data.token_files.megatron import indexed_dataset_module
from relora_ds.data.tokenizer import Tokenizer
from relora_ds.data.tokens import TokenFile
from relora_ds.errors import DataError


def test_megatron_reads_the_documents(
    tokenizer: Tokenizer, text_file: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "new" / "corpus"
    seen: list[tuple[int, int | None]] = []
    report = prepare(
        [text_file], tokenizer.path, prefix, progress=lambda done, total: seen.append((done, total))
    )
    dataset = indexed_dataset_module().IndexedDataset(str(prefix))
    texts = text_file.read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    assert len(dataset) == len(texts) == report.num_documents == 40
    for sequence, text in zip((dataset[n] for n in range(40)), texts, strict=True):
        assert sequence.dtype == np.uint16
        assert sequence.tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    size = text_file.stat().st_size
    assert seen[-1] == (size, size)
    assert sorted(path.name for path in prefix.parent.iterdir()) == [
        "corpus.bin",
        "corpus.idx",
        "corpus.json",
    ]


def test_description_is_found_and_true(
    tokenizer: Tokenizer, text_file: Path, tmp_path: Path
) -> None:
    report = prepare([text_file], tokenizer.path, tmp_path / "corpus.bin")
    file = TokenFile(tmp_path / "corpus")
    assert file.metadata == report
    assert file.tokenizer_sha256 == tokenizer.sha256
    assert file.num_tokens == report.num_tokens
    assert file.max_token_id == report.max_token_id == file.window(0, file.num_tokens).max()
    stored = json.loads((tmp_path / "corpus.json").read_text())
    assert stored["sources"] == [{"path": str(text_file), "bytes": text_file.stat().st_size}]
    assert stored["vocab_size"] == 400


def test_long_document_is_one_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "one more fox and a dog\n" * (3 * PIECE_LENGTH // 23)
    (tmp_path / "long.txt").write_text(text)
    report = prepare([tmp_path / "long.txt"], tokenizer.path, tmp_path / "long")
    file = TokenFile(tmp_path / "long")
    assert (report.num_documents, file.num_documents) == (1, 1)
    ids = file.window(0, file.num_tokens).tolist()
    assert ids == [*tokenizer.encode(text.removesuffix("\n")), tokenizer.eos_id]


def test_skipped_input_is_reported(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fox"}\noops\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2:1: invalid JSON"):
        prepare([tmp_path / "a.jsonl"], tokenizer.path, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    with caplog.at_level(logging.WARNING):
        report = prepare([tmp_path / "a.jsonl"], tokenizer.path, tmp_path / "a", on_error="skip")
    assert report.skipped == {"empty document": 1, "invalid JSON": 1}
    assert "left out" in caplog.text


def test_interrupted_publication_leaves_nothing_that_opens(
    tokenizer: Tokenizer, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an older version of the same file was complete."""
    prepare([text_file], tokenizer.path, tmp_path / "a")
    moved: list[str] = []

    def replace(source: str, target: str) -> None:
        if len(moved) == 2:
            raise KeyboardInterrupt
        Path(source).rename(target)
        moved.append(target)

    monkeypatch.setattr(prepare_module.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        prepare([text_file], tokenizer.path, tmp_path / "a")
    with pytest.raises(DataError, match=r"a\.idx: cannot be read"):
        TokenFile(tmp_path / "a")


def test_output_that_cannot_be_written(
    tokenizer: Tokenizer, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        prepare([text_file], tokenizer.path, tmp_path / "file" / "prefix")


def test_a_slash_at_the_end_means_nothing(
    text_file: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare([text_file], tokenizer.path, f"{tmp_path}/corpus/")
    assert TokenFile(f"{tmp_path}/corpus/").num_tokens == TokenFile(tmp_path / "corpus").num_tokens


def test_a_name_that_is_no_text_is_recorded_as_far_as_it_is(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    named = tmp_path / os.fsdecode(b"caf\xe9.txt")  # of an archive in Latin-1
    named.write_text("some words\n\nand more")
    metadata = prepare([named], tokenizer.path, tmp_path / "tokens")
    assert metadata.sources[0].path == f"{tmp_path}/caf\ufffd.txt"
    assert TokenFile(tmp_path / "tokens").metadata == metadata
