"""The exported tokenizer gives the ids of the SentencePiece model it came from."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import sentencepiece

from relora_ds.errors import DataError
from relora_ds.model.hf.tokenizer import write_tokenizer

TEXTS = [
    "",
    " ",
    "   ",
    "Hello world",
    " leading space",
    "  two leading, trailing  ",
    "double  spaces   and\ttabs",
    "line one\nline two\r\n\n  indented",
    "digits 1234567890 and 3.14159e-10",
    "caf\u00e9 na\u00efve \u00fcber \u4f60\u597d \u043c\u0438\u0440 \u0627\u0644",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 end",
    "e\u0301 \ufb01 \uff21 \u2460 \u00a0nbsp",
    "a\u2581b \u2581",
    "aaaaaaaaaaaaa eeeee ssssss ......",
    "<0x41> <unk <pad",
]


def corpus() -> list[str]:
    """Lines of a module that every Python has."""
    lines = Path(json.__file__).with_name("decoder.py").read_text().splitlines()
    return [line for line in lines if line.strip()] + [f"x = {i} " * 3 for i in range(50)]


def train(path: Path, **options) -> Path:
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "vocab_size": 600,
    }
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(path.with_suffix("")),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=2,
        hard_vocab_limit=False,
        **{**settings, **options},
    )
    return path


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def random_texts(count: int) -> list[str]:
    """Strings in which merges compete: few letters, runs, words of the corpus."""
    draw = random.Random(0)
    words = " ".join(corpus()).split(" ")
    alphabets = ["ae ", "aest \n", "01 .", "\u00e9\U0001f600 x", "\"'=_-# ", words]
    return ["".join(draw.choices(draw.choice(alphabets), k=40)) for _ in range(count)]


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_transformers_encodes_as_sentencepiece(tmp_path, model_path, byte_fallback):
    transformers = pytest.importorskip("transformers")
    if not byte_fallback:
        model_path = train(tmp_path / "plain.model", byte_fallback=False)
    write_tokenizer(model_path, tmp_path)
    # what AutoTokenizer decides by in an exported model
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    for text in TEXTS + random_texts(300):
        ids = ours.Encode(text)
        assert theirs.encode(text) == ids, text
        if ours.unk_id() not in ids:  # the two show an unknown character differently
            assert theirs.decode(ids) == ours.Decode(ids), text
        if byte_fallback and "\u2581" not in text:
            assert theirs.decode(ids) == text


def test_special_tokens_and_size(tmp_path, model_path):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(model_path, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = [theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id]
    assert ids == [0, 1, 2, 3]
    assert len(theirs) == sentencepiece.SentencePieceProcessor(str(model_path)).GetPieceSize()
    assert theirs.decode([1, *theirs.encode("a b"), 2], skip_special_tokens=True) == "a b"
    assert (tmp_path / "tokenizer.model").read_bytes() == model_path.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram", "vocab_size": 400}, "is not a plain BPE model"),
        ({"user_defined_symbols": ["<sep>", "<x>"]}, "is not a plain BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text"),
        ({"remove_extra_whitespaces": True}, "normalises text"),
        ({"add_dummy_prefix": False}, "adds no dummy prefix"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path, options, message):
    path = train(tmp_path / "other.model", **options)
    with pytest.raises(DataError, match=message):
        write_tokenizer(path, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_file_that_is_no_model(tmp_path):
    path = tmp_path / "tokenizer.model"
    for content in (b"not a model", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as a SentencePiece model"):
            write_tokenizer(path, tmp_path)
    with pytest.raises(DataError, match="cannot be read as a SentencePiece model"):
        write_tokenizer(tmp_path / "absent.model", tmp_path)


def test_writing_needs_no_hugging_face_package(tmp_path, model_path, monkeypatch):
    for name in ("tokenizers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    write_tokenizer(model_path, tmp_path)
