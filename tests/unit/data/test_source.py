"""From the configuration to open files, and the checks between files, tokenizer and model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from relora_ds.config.sections import DataConfig
from relora_ds.data import source
from relora_ds.data.builtin import BuiltinCorpus
from relora_ds.data.prepare import prepare
from relora_ds.data.source import open_corpus
from relora_ds.data.tokenizer import Tokenizer, train_tokenizer
from relora_ds.data.tokens import TokenFile
from relora_ds.errors import ConfigError, DataError


@pytest.fixture
def prefix(tokenizer: Tokenizer, text_file: Path, tmp_path: Path) -> str:
    """A prepared token file."""
    prepare([text_file], tokenizer.path, tmp_path / "corpus")
    return str(tmp_path / "corpus")


def test_single_file(prefix: str, tokenizer: Tokenizer) -> None:
    corpus = open_corpus(DataConfig(train=prefix, valid=prefix, tokenizer=str(tokenizer.path)))
    assert corpus.weights == (1.0,)
    assert corpus.tokenizer == tokenizer.path
    assert [file.prefix for file in corpus.files] == [prefix, prefix]
    assert len({*corpus.fingerprints()}) == 1
    corpus.check_vocabulary(400)
    corpus.check_length(256)


def test_blend_without_validation(prefix: str, write_tokens: Callable[..., TokenFile]) -> None:
    other = write_tokens([[1, 2, 3]], "other").prefix
    corpus = open_corpus(DataConfig(train=[(3.0, prefix), (1.0, other)]))
    assert corpus.weights == (0.75, 0.25)
    assert corpus.valid is None
    assert corpus.tokenizer is None
    with pytest.raises(DataError, match=r"3 tokens, but one sample of train\.seq_length 3 takes 4"):
        corpus.check_length(3)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [([1e308, 1e308], (0.5, 0.5)), ([5e-324, 5e-324], (0.5, 0.5)), ([1.7e308, 1.7e304], None)],
)
def test_only_the_ratio_of_weights_counts(
    prefix: str, weights: list[float], shares: tuple[float, ...] | None
) -> None:
    found = open_corpus(DataConfig(train=[(weight, prefix) for weight in weights])).weights
    assert found == shares if shares else found == pytest.approx([1 / 1.0001, 1e-4 / 1.0001])


@pytest.mark.parametrize("weights", [[1.0, 1e-6], [1e300, 1e-300]])
def test_a_share_that_no_batch_could_meet_is_named_at_the_start(
    prefix: str, weights: list[float]
) -> None:
    with pytest.raises(DataError, match="of the sum, but must be at least 1/16384; raise it"):
        open_corpus(DataConfig(train=[(weight, prefix) for weight in weights]))


def test_builtin(prefix: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, int]] = []

    def fake(cache_dir: Path, vocab_size: int) -> BuiltinCorpus:
        asked.append((cache_dir, vocab_size))
        return BuiltinCorpus(Path(prefix), Path(prefix), tokenizer.path)

    monkeypatch.setattr(source, "builtin_corpus", fake)
    config = DataConfig(source="builtin", cache_dir="/cache", builtin_vocab_size=1024)
    corpus = open_corpus(config)
    assert asked == [(Path("/cache"), 1024)]
    assert corpus.tokenizer == tokenizer.path
    assert corpus.valid is not None


def test_training_file_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"data\.train is missing"):
        open_corpus(DataConfig())


def test_vocabulary_of_the_files(write_tokens: Callable[..., TokenFile]) -> None:
    file = write_tokens([[1, 70_000, 2]], dtype=np.int32)
    corpus = open_corpus(DataConfig(train=file.prefix))
    corpus.check_vocabulary(70_001)
    with pytest.raises(DataError, match=r"holds token id 70000, but .* is 70000; .* least 70001"):
        corpus.check_vocabulary(70_000)


def test_vocabulary_of_the_tokenizer(
    write_tokens: Callable[..., TokenFile], tokenizer: Tokenizer
) -> None:
    prefix = write_tokens([[1, 2, 3]]).prefix
    corpus = open_corpus(DataConfig(train=prefix, tokenizer=str(tokenizer.path)))
    with pytest.raises(DataError, match=r"the tokenizer has 400 ids, but .* is 399"):
        corpus.check_vocabulary(399)


def test_tokenizers_must_agree(
    prefix: str, text_file: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    other = train_tokenizer([text_file], 390, tmp_path / "other.model")
    with pytest.raises(DataError, match="prepare all data with the same tokenizer"):
        open_corpus(DataConfig(train=prefix, tokenizer=str(other.path)))
    prepare([text_file], other.path, tmp_path / "valid")
    with pytest.raises(DataError, match=r"valid\.json: made with tokenizer"):
        open_corpus(DataConfig(train=prefix, valid=str(tmp_path / "valid")))
    with pytest.raises(DataError, match="tokenizer model cannot be read"):
        open_corpus(DataConfig(train=prefix, tokenizer=str(tmp_path / "missing.model")))


def test_documents_are_told_apart_by_the_id_that_ends_them(
    prefix: str, tokenizer: Tokenizer, write_tokens: Callable[..., TokenFile]
) -> None:
    end = tokenizer.eos_id
    assert open_corpus(DataConfig(train=prefix)).document_end is None
    assert open_corpus(DataConfig(train=prefix, document_mask=True)).document_end == end
    elsewhere = write_tokens([[5, 6, end], [7, end]], "elsewhere").prefix
    with pytest.raises(ConfigError, match=r"neither data.tokenizer nor .*elsewhere\.json says"):
        open_corpus(DataConfig(train=elsewhere, document_mask=True))
    named = DataConfig(train=elsewhere, document_mask=True, tokenizer=str(tokenizer.path))
    assert open_corpus(named).document_end == end
    with_gaps = write_tokens([[], [], [], [5, end]], "gaps").prefix
    assert open_corpus(named.model_copy(update={"train": with_gaps})).document_end == end
    wordless = write_tokens([[end], [], [end]], "wordless").prefix
    with pytest.raises(DataError, match="its 3 documents hold nothing but the token that ends"):
        open_corpus(named.model_copy(update={"train": wordless}))
    for texts, at, last in (([[5, 6], [7, end]], 1, 6), ([[], [5, end], [7, 8]], 3, 8)):
        unended = write_tokens(texts, "unended").prefix
        with pytest.raises(
            DataError, match=f"ends at token {at} with id {last} and not with {end}"
        ):
            open_corpus(named.model_copy(update={"train": unended}))
