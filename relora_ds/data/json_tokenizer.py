"""Hugging Face's `tokenizer.json`: byte-level BPE as in Llama 3, and what else the package reads.

The file says how text becomes ids, and not which ids begin and end a text: those stand in
`tokenizer_config.json` or `special_tokens_map.json` beside it, or go by their usual names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relora_ds.errors import DataError
from relora_ds.files.regular import read_regular

NAME = "tokenizer.json"
CONFIG = "tokenizer_config.json"
COMPANIONS = (CONFIG, "special_tokens_map.json")
"""Files beside a `tokenizer.json` that name its special tokens, the decisive one first."""
_BYTES = 256 << 20
_CONFIG_BYTES = 16 << 20
_USUAL = {
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "<|im_start|>", "[CLS]"),
    "eos": ("<|end_of_text|>", "</s>", "<|endoftext|>", "<eos>", "<|im_end|>", "[SEP]"),
    "pad": ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>"),
    "unk": ("<unk>", "[UNK]"),
}
"""Special tokens by their names in published models, the likeliest first."""


class JsonTokenizer:
    """Text to ids and back, as `transformers.AutoTokenizer` does it without special tokens.

    Args:
        path: the file; those that name its special tokens lie beside it.

    Raises:
        DataError: the file is missing, damaged, or names no token that ends a text; or the package
            `tokenizers` is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        content = read_json_tokenizer(path)
        self.path = Path(path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        """Hash of the file; token files record it."""
        description = _parsed(content, self.path)
        vocabulary = _vocabulary(description)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        """Ids from 0 on; there may be gaps."""
        specials = _special_tokens(self.path, vocabulary)
        if "eos" not in specials:
            raise DataError(
                f"{self.path}: no token is named that ends a text; write "
                f'{self.path.with_name(CONFIG)} with {{"eos_token": "..."}}, one of the tokens in '
                "it"
            )
        self.eos_id = vocabulary[specials["eos"]]
        self._tokenizer = _build(description, self.path)
        self._continuing = _build(_without_prefix(description), self.path)

    def pieces(self) -> list[str | None]:
        """Every token by its id; None for ids that have none."""
        return [self._tokenizer.id_to_token(i) for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without bos or eos."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], continued: bool = False) -> list[list[int]]:
        """Ids of each text; the texts are spread over the machine's cores.

        Args:
            texts: any number of texts.
            continued: the texts are later parts of longer ones, so that nothing is put before them.
        """
        tokenizer = self._continuing if continued else self._tokenizer
        found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)


def special_tokens(path: str | Path) -> dict[str, tuple[str, int]]:
    """Text and id of `bos`, `eos`, `pad` and `unk`, those that there are; needs no package.

    Args:
        path: a `tokenizer.json`; what names its special tokens lies beside it.

    Raises:
        DataError: it is missing or damaged, or a token that is named is not in it.
    """
    vocabulary = _vocabulary(_parsed(read_json_tokenizer(path), Path(path)))
    found = _special_tokens(Path(path), vocabulary)
    return {kind: (token, vocabulary[token]) for kind, token in found.items()}


def read_json_tokenizer(path: str | Path) -> bytes:
    """Content of a `tokenizer.json`, not looked at.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return read_regular(path, _BYTES)
    except OSError as error:
        raise DataError(f"{path}: tokenizer cannot be read: {error.strerror}") from error


def _parsed(content: bytes, path: Path) -> dict[str, Any]:
    try:
        description = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is damaged ({error}); copy it again") from error
    if not isinstance(description, dict) or "model" not in description:
        raise DataError(
            f"{path}: is no tokenizer.json of Hugging Face's; name one, or a SentencePiece model"
        )
    return description


def _vocabulary(description: Mapping[str, Any]) -> dict[str, int]:
    """Id of every token, added ones included."""
    model, added = description["model"], description.get("added_tokens") or []
    try:
        vocab = model["vocab"]
        if isinstance(vocab, list):  # a unigram model's
            vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
        return dict(vocab) | {token["content"]: token["id"] for token in added}
    except (LookupError, TypeError, ValueError):
        return {}


def _build(description: Mapping[str, Any], path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError(
            f"{path}: reading it needs the package tokenizers: pip install tokenizers"
        ) from error
    try:
        tokenizer = Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the package raises nothing more precise
        raise DataError(f"{path}: is no tokenizer.json that can be used ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _without_prefix(value: Any) -> Any:
    """A description that puts no blank before a text."""
    if isinstance(value, list):
        return [
            _without_prefix(each)
            for each in value
            if not (isinstance(each, dict) and each.get("type") == "Prepend")
        ]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    kept = {key: each if key == "vocab" else _without_prefix(each) for key, each in value.items()}
    if "add_prefix_space" in kept:
        kept["add_prefix_space"] = False
    if kept.get("type") == "Metaspace":
        kept["prepend_scheme"] = "never"
    return kept


def _special_tokens(path: Path, vocabulary: Mapping[str, int]) -> dict[str, str]:
    """Text of the special tokens: what the files beside it say, then the usual names."""
    named: dict[str, str] = {}
    for name in reversed(COMPANIONS):
        for kind in _USUAL:
            token = read_config(path.with_name(name)).get(f"{kind}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                if text not in vocabulary:
                    raise DataError(
                        f"{path.with_name(name)}: {kind}_token is {text!r}, which {path.name} does "
                        "not hold: the files are of different tokenizers; copy them again"
                    )
                named[kind] = text
    if "eos" not in named:
        for kind, usual in _USUAL.items():
            known = [token for token in usual if token in vocabulary]
            if known:
                named.setdefault(kind, known[0])
    return named


def read_config(path: Path) -> dict[str, Any]:
    """Content of a file beside a tokenizer; empty where there is none.

    Raises:
        DataError: it cannot be read.
    """
    try:
        content = json.loads(read_regular(path, _CONFIG_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy the tokenizer again") from error
    return content if isinstance(content, dict) else {}
