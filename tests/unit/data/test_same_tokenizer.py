"""A model and a token file are held together only if ids mean the same to both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relora_ds.config.sections import DataConfig
from relora_ds.data.prepare import prepare
from relora_ds.data.source import Corpus, open_corpus
from relora_ds.data.tokenizer import Tokenizer, train_tokenizer
from relora_ds.errors import DataError
from relora_ds.model.hf.tokenizer import write_tokenizer


@pytest.fixture
def corpus(tokenizer: Tokenizer, text_file: Path, tmp_path: Path) -> Corpus:
    prepare([text_file], tokenizer.path, tmp_path / "corpus")
    return open_corpus(DataConfig(train=str(tmp_path / "corpus")))


def model_with(tokenizer: Tokenizer, directory: Path) -> Path:
    directory.mkdir()
    write_tokenizer(tokenizer.path, directory)
    return directory


def test_the_same_one_passes_in_any_form(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, text_file: Path
) -> None:
    pytest.importorskip("tokenizers")
    model = model_with(tokenizer, tmp_path / "model")
    corpus.check_tokenizer_of(model)
    (model / "tokenizer.model").unlink()  # as transformers saves it again
    description = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(description, indent=3))
    named = open_corpus(DataConfig(train=corpus.train[0].prefix, tokenizer=str(tokenizer.path)))
    named.check_tokenizer_of(model)
    prepare([text_file], model, tmp_path / "by_json")
    by_json = open_corpus(DataConfig(train=str(tmp_path / "by_json")))
    by_json.check_tokenizer_of(model)


def test_what_cannot_be_told_is_believed(corpus: Corpus, tmp_path: Path) -> None:
    corpus.check_tokenizer_of(tmp_path)


def test_another_one_is_refused(
    corpus: Corpus, tokenizer: Tokenizer, text_file: Path, tmp_path: Path
) -> None:
    other = train_tokenizer([text_file], 390, tmp_path / "other.model")
    model = model_with(other, tmp_path / "model")
    named = open_corpus(DataConfig(train=corpus.train[0].prefix, tokenizer=str(tokenizer.path)))
    for each in (corpus, named):
        with pytest.raises(DataError, match=r"another tokenizer .* prepare the data with"):
            each.check_tokenizer_of(model)


def test_the_end_of_documents_is_known(corpus: Corpus, tokenizer: Tokenizer) -> None:
    assert corpus.tokenizer is None
    assert corpus.eos_id == tokenizer.eos_id == 2
    metadata = corpus.train[0].metadata
    assert metadata is not None
    earlier = metadata.model_copy(update={"eos_id": None}).sealed()
    assert earlier.is_sound, "files of earlier versions do not say it"
    assert metadata.model_copy(update={"eos_id": 5}).is_sound is False
