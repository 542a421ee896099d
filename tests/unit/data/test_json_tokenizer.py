"""Hugging Face's tokenizer.json: its ids are transformers', from token files to an export."""

from __future__ import annotations

import builtins
import json
import random
from pathlib import Path
from typing import Any

import pytest

from relora_ds.data.json_tokenizer import JsonTokenizer, special_tokens
from relora_ds.data.prepare import prepare
from relora_ds.data.tokenizer import (
    Tokenizer,
    open_tokenizer,
    special_ids,
    tokenizer_file,
    tokenizer_files,
    tokenizer_hash,
)
from relora_ds.data.tokens import TokenFile
from relora_ds.errors import DataError
from relora_ds.model.hf.tokenizer import export_obstacle, write_tokenizer

tokenizers = pytest.importorskip("tokenizers")

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(text: Path, specials: list[str], **options: Any) -> Any:
    """A tokenizer of bytes, split as Llama 3's."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA_3), "isolated")
    level = tokenizers.pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train([str(text)], trainer)
    return made


@pytest.fixture(scope="module")
def folder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as Llama 3's: the tokenizer puts a token before every text."""
    directory = tmp_path_factory.mktemp("llama3")
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|pad|>"]
    made = byte_level(text_file, specials)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    made.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": {"__type": "AddedToken", "content": "<|eot_id|>", "special": True},
        "pad_token": "<|pad|>",
        "model_max_length": 256,
        "chat_template": "{{ messages }}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def odd_texts(count: int) -> list[str]:
    draw = random.Random(0)
    alphabets = [
        "ab \n",
        " \t\r\n",
        "019.,'",
        "\u00e9\u0301\U0001f600\u4f60 ",
        "The quick brown 's",
    ]
    return ["".join(draw.choices(draw.choice(alphabets), k=40)) for _ in range(count)]


def test_ids_are_those_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = open_tokenizer(folder)
    assert isinstance(ours, JsonTokenizer)
    texts = ["", " ", "a<|eot_id|>b", *odd_texts(300)]
    expected = [theirs.encode(text, add_special_tokens=False) for text in texts]
    assert [ours.encode(text) for text in texts] == expected
    assert ours.encode_batch(texts) == ours.encode_batch(texts, continued=True) == expected
    assert all(ours.decode(ids) == text for ids, text in zip(expected, texts, strict=True))
    assert ours.vocab_size == len(theirs)
    assert (ours.eos_id, special_ids(folder / "tokenizer.json")) == (2, (0, 2, 3))
    assert ours.pieces()[:2] == ["<|begin_of_text|>", "<|end_of_text|>"]


def test_the_usual_names_stand_in_for_a_missing_configuration(
    text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    byte_level(text_file, ["<|end_of_text|>", "<s>", "<unk>"]).save(str(path))
    found = special_tokens(path)
    assert found == {"bos": ("<s>", 1), "eos": ("<|end_of_text|>", 0), "unk": ("<unk>", 2)}
    byte_level(text_file, ["<done>"]).save(str(path))
    with pytest.raises(DataError, match=r"tokenizer_config\.json with .*eos_token"):
        open_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<done>"}')
    assert open_tokenizer(path).eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<fin>"}')
    with pytest.raises(DataError, match=r"eos_token is '<fin>', which tokenizer\.json"):
        open_tokenizer(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                           "use_regex": True}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "\u0120",
                           "prepend_scheme": "always", "split": False}},
        {"normalizer": {"type": "Prepend", "prepend": "\u0120"}},
        {"normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u0120"}, {"type": "NFC"}]}},
    ],
)  # fmt: skip
def test_a_later_part_of_a_text_begins_without_a_blank(
    folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    description = json.loads((folder / "tokenizer.json").read_text()) | changes
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(description))
    tokenizer = open_tokenizer(path)
    blank = tokenizer.encode("a")[0]
    assert tokenizer.encode_batch(["a"], continued=True)[0] != tokenizer.encode("a")
    assert blank not in tokenizer.encode_batch(["abc"], continued=True)[0]


def test_token_files_and_exports_carry_it(folder: Path, text_file: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    metadata = prepare([text_file], folder, tmp_path / "corpus")
    assert metadata.tokenizer_sha256 == tokenizer_hash(folder)
    assert metadata.eos_id == 2
    tokens = TokenFile(tmp_path / "corpus").window(0, 200).tolist()
    first = text_file.read_text().split("\n\n")[0]
    tokenizer = open_tokenizer(folder)
    assert tokens[: tokens.index(2)] == tokenizer.encode(first)

    out = tmp_path / "out"
    out.mkdir()
    file = tokenizer_file(folder)
    assert set(tokenizer_files(file)) == {"tokenizer.json", "tokenizer_config.json"}
    assert export_obstacle(file) is None
    write_tokenizer(file, out)
    (out / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.encode(first, add_special_tokens=False) == tokenizer.encode(first)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 2, 3)
    assert theirs.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is damaged"),
        (b"[]", "is no tokenizer.json"),
        (b'{"model": {}}', "no token is named"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        open_tokenizer(path)


def test_directories_hold_one_or_the_other(folder: Path, tmp_path: Path, tokenizer: Tokenizer):
    with pytest.raises(DataError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    assert isinstance(open_tokenizer(tmp_path), Tokenizer)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert tokenizer_file(tmp_path).name == "tokenizer.json"


def test_a_missing_package_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return found(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match="pip install tokenizers"):
        open_tokenizer(folder)
