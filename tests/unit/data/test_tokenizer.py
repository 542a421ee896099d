"""Round trips, the special ids, determinism, and words for what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora_ds.data.tokenizer import Tokenizer, _thinned, tokenizer_hash, train_tokenizer
from relora_ds.errors import DataError


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    assert tokenizer.vocab_size == 400
    assert tokenizer.sha256 == tokenizer_hash(tokenizer.path)


@given(
    text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"))
)
def test_any_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_split_and_space_is_kept(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("1234")) >= 4
    assert tokenizer.encode("a  b") != tokenizer.encode("a b")


def test_special_words_in_text_are_only_text(tokenizer: Tokenizer) -> None:
    assert not {1, 2, 3} & {*tokenizer.encode("<s> </s> <pad>")}


def test_continued_text_gets_no_space(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox\n jumps over the lazy dog"
    whole = tokenizer.encode(text)
    for at in (text.index("\n") + 1, text.index(" brown")):
        begun = tokenizer.encode_batch([text[:at]])[0]
        assert begun + tokenizer.encode_batch([text[at:]], continued=True)[0] == whole


def test_training_is_deterministic(tokenizer: Tokenizer, text_file: Path, tmp_path: Path) -> None:
    again = train_tokenizer([text_file], 400, tmp_path / "new" / "again.model")
    assert again.sha256 == tokenizer.sha256
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["again.model"]


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [(100_000, r"the largest possible value is \d+"), (100, r"alone take \d+; raise it")],
)
def test_vocabulary_that_does_not_fit(
    text_file: Path, tmp_path: Path, vocab_size: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        train_tokenizer([text_file], vocab_size, tmp_path / "no.model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_unusable_models(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.model: "):
        Tokenizer(path)


def test_truncated_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "half.model"
    model = tokenizer.path.read_bytes()
    path.write_bytes(model[: len(model) // 2])
    with pytest.raises(DataError, match="not a SentencePiece model"):
        Tokenizer(path)


def test_thinning_keeps_every_nth_within_the_budget() -> None:
    sentences = [f"{number:04}" for number in range(1000)]
    assert _thinned(sentences, 4000) == sentences
    kept = _thinned(iter(sentences), 1001)
    assert kept == sentences[::4]
