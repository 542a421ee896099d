"""The exported tokenizer gives the ids of the SentencePiece model it came from."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import sentencepiece

from relora_ds.errors import DataError
from relora_ds.model.hf.normalisation import NAMED, named_steps
from relora_ds.model.hf.tokenizer import export_obstacle, write_tokenizer

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


RANGES = (
    (0x09, 0x0E), (0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x390, 0x3D0), (0x1100, 0x1200),
    (0x1E00, 0x1F00), (0x2000, 0x2070), (0x2460, 0x2480), (0x3040, 0x3100), (0xAC00, 0xAC40),
    (0xFB00, 0xFB07), (0xFF01, 0xFFA0), (0x1F600, 0x1F610),
)  # fmt: skip
ODD = [chr(code) for start, stop in RANGES for code in range(start, stop)]
ODD += ["<0x41>", "<sep>", "<x>", "\u2581", "\ufeff", "\r\n"]


def odd_texts(count: int) -> list[str]:
    """Strings of everything that normalises, composes or is mistaken for something else."""
    draw = random.Random(1)
    few = (["e\u0301", "\u1ea1\u0302", "a\u0327\u0301", "\uff76\uff9e"], [" ", "  ", "a", "\n"])
    return [
        "".join(draw.choices(draw.choice([ODD, *few, ODD]), k=draw.randrange(1, 40)))
        for _ in range(count)
    ]


UNIGRAM = {"model_type": "unigram", "vocab_size": 400}
T5 = {
    "model_type": "unigram",
    "vocab_size": 150,
    "byte_fallback": False,
    "normalization_rule_name": "nmt_nfkc",
    "remove_extra_whitespaces": True,
}
KINDS = {
    "bpe": {},
    "bpe without bytes": {"byte_fallback": False},
    "bpe without a dummy prefix": {"add_dummy_prefix": False},
    "bpe, blanks at the end": {"treat_whitespace_as_suffix": True},
    "bpe as spm_train makes it": {
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "split_digits": False,
    },
    "bpe, folded": {"normalization_rule_name": "nfkc_cf"},
    "bpe with pieces of the user": {"user_defined_symbols": ["<sep>", "<x>", "ab"]},
    "unigram": UNIGRAM,
    "unigram like T5's": T5,
    "unigram, folded, without a prefix": {
        **UNIGRAM,
        "normalization_rule_name": "nmt_nfkc_cf",
        "add_dummy_prefix": False,
    },
    "unigram with pieces of the user": {**UNIGRAM, "user_defined_symbols": ["<sep>", "<x>", "ab"]},
    "characters": {"model_type": "char", "vocab_size": 400, "byte_fallback": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_encodes_as_sentencepiece(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    model_path = train(tmp_path / "plain.model", **KINDS[kind])
    write_tokenizer(model_path, tmp_path)
    # what AutoTokenizer decides by in an exported model
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    for text in TEXTS + random_texts(300) + odd_texts(700):
        ids = ours.Encode(text)
        assert theirs.encode(text) == ids, text
        if kind == "bpe" and "\u2581" not in text:
            assert theirs.decode(ids) == text
        if ours.unk_id() not in ids:  # the two show an unknown character differently
            assert theirs.decode(ids) == ours.Decode(ids), text


@pytest.mark.parametrize("rules", NAMED)
def test_every_character_that_rules_name_is_normalised_alike(rules):
    """Whatever versions of Unicode Python, SentencePiece and Hugging Face's package know."""
    tokenizers = pytest.importorskip("tokenizers")
    steps = {"type": "Sequence", "normalizers": named_steps(rules)}
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    description = {"version": "1.0", "normalizer": steps, "model": empty}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(description)).normalizer
    ours = sentencepiece.SentencePieceNormalizer(
        rule_name=rules,
        add_dummy_prefix=False,
        escape_whitespaces=False,
        remove_extra_whitespaces=False,
    )
    characters = [chr(code) for code in range(1, 0x20000) if not 0xD800 <= code < 0xE000]
    named = [c for c, n in zip(characters, ours.Normalize(characters), strict=True) if c != n]
    assert len(named) > 3000
    texts = [*named, "\ufffd", "\U00011935\U00011930", "\U000105d2\u0307", "n\x07\u0301"]
    texts += ["\u0345\u0300", "e\ufffd\u0301", "\U0001ccd6\u0301", "\t\u0301a"]
    assert [theirs.normalize_str(text) for text in texts] == ours.Normalize(texts)


def test_special_tokens_and_size(tmp_path, model_path):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(model_path, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = [theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id]
    assert ids == [0, 1, 2, 3]
    assert len(theirs) == sentencepiece.SentencePieceProcessor(str(model_path)).GetPieceSize()
    assert theirs.decode([1, *theirs.encode("a b"), 2], skip_special_tokens=True) == "a b"
    assert (tmp_path / "tokenizer.model").read_bytes() == model_path.read_bytes()


def test_words_are_not_expressed_but_exported(tmp_path):
    path = train(tmp_path / "words.model", model_type="word", byte_fallback=False, vocab_size=60)
    obstacle = export_obstacle(path)
    assert obstacle is not None
    assert "whole words" in obstacle
    (tmp_path / "out").mkdir()
    write_tokenizer(path, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["tokenizer.model"]


def test_rules_of_the_users_are_not_expressed_but_exported(tmp_path):
    rules = tmp_path / "rules.tsv"
    rules.write_text("61\t62\n")
    path = train(tmp_path / "ruled.model", normalization_rule_tsv=str(rules))
    assert "rules of its own" in str(export_obstacle(path))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "characters"])
def test_what_can_be_expressed_meets_no_obstacle(tmp_path, kind):
    assert export_obstacle(train(tmp_path / "plain.model", **KINDS[kind])) is None


def test_another_file_is_no_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\xff\xfe nothing")
    with pytest.raises(DataError, match="cannot be read as a SentencePiece model"):
        write_tokenizer(path, tmp_path)
