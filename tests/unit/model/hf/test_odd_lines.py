"""Lines that no corpus should have, and every one has: transformers' ids are those trained on.

A few hundred of them by default, ten thousand for every kind behind the marker `slow`.
"""

from __future__ import annotations

import json
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relora_ds.data.tokenizer import open_tokenizer
from relora_ds.model.hf.tokenizer import write_tokenizer
from tests.unit.data.test_json_tokenizer import byte_level
from tests.unit.model.hf.test_exported_tokenizer import KINDS, corpus, train

SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>"]
_LONGEST = 20_000
_RUN = re.compile(r"(.)\1{11}")
"""Of which a unigram model may have several splits of one score; see `sentence_piece`."""
_SCRIPTS = (
    *("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "THAI", "HANGUL", "HIRAGANA"),
    *("CJK UNIFIED", "TAMIL", "GEORGIAN", "ETHIOPIC", "KHMER", "TIBETAN"),
)
_EMOJI = [
    *("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd"),
    *("\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "3\ufe0f\u20e3", "\U0001f9d1\u200d\U0001f680"),
]
_BLANKS = [" ", "  ", *"\t\u00a0\u2003\u3000\u200b\u200e\u202e\ufeff"]
_ENDS = ["\r\n", "\n\n", *"\n\r\x0b\x0c\x85\u2028\u2029"]
_LOOKALIKES = ["<0x41>", "<0x0A>", "<s", "</s", "<unk", "\u2581a", "\u0120", "[CLS", "<|", "##ing"]
_DAMAGED = (
    *(b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xc0\xaf", b"\xff\xfe", b"\xf4\x90\x80\x80"),
    b"caf\xe9",
)
"""Lone surrogates, and other bytes that are no UTF-8."""


def _by_script() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {script: [] for script in _SCRIPTS}
    for code in [*range(0x20, 0x3200), *range(0x4E00, 0x4E80), *range(0xAC00, 0xAC80)]:
        name = unicodedata.name(chr(code), "")
        for script in _SCRIPTS:
            if name.startswith(script):
                found[script].append(chr(code))
    return found


def odd_lines(count: int) -> Iterator[str]:
    """Mixed scripts, marks, emoji, blanks, line ends, control characters, what bytes that are no
    UTF-8 become, runs, code, and a few lines of many thousand characters."""
    draw, scripts = random.Random(3), _by_script()
    control = [chr(code) for code in [*range(1, 0x20), 0x7F, *range(0x80, 0xA0)]]
    marks = [chr(code) for code in range(0x300, 0x370)]
    anything = [chr(code) for code in range(0xA0, 0xD800)]
    beyond = [chr(code) for code in range(0x10000, min(sys.maxunicode, 0x1FB00), 7)]
    damaged = [each.decode("utf-8", "replace") for each in _DAMAGED]
    words = " ".join(corpus()).split(" ")
    pools = [control, marks, anything, beyond, damaged, words, _EMOJI, _BLANKS, _ENDS, _LOOKALIKES]
    pools += [[*"0123456789.,-+e"], [*"aaab  "]]
    for number in range(count):
        chosen = [*draw.sample(pools, 2), scripts[draw.choice(_SCRIPTS)], words]
        parts = [draw.choice(draw.choice(chosen)) for _ in range(draw.randrange(1, 60))]
        line = draw.choice(["", " "]).join(parts)
        if number % 500 == 7:
            line = (line + " ") * (_LONGEST // (len(line) + 1))
        if number % 500 == 8:  # without a place to cut
            line = draw.choice(["x", "\u4e00", "\U0001f600", "\u0301"]) * _LONGEST
        yield line


def _sentence_piece(kind: str) -> Callable[[Path], Path]:
    return lambda directory: train(directory / "plain.model", **KINDS[kind])


def _byte_level(directory: Path) -> Path:
    (directory / "text.txt").write_text("\n".join(corpus()))
    made = byte_level(directory / "text.txt", SPECIALS)
    made.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


TOKENIZERS: dict[str, Callable[[Path], Path]] = {
    "byte-level bpe": _byte_level,
    **{kind: _sentence_piece(kind) for kind in KINDS if kind != "characters"},
}


def by_transformers(exported: Path, lines: list[str]) -> list[list[int]]:
    """Ids of lines by the transformers of this process."""
    transformers: Any = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    return theirs(lines, add_special_tokens=False)["input_ids"]


def check(
    kind: str,
    directory: Path,
    count: int,
    read: Callable[[Path, list[str]], list[list[int]]] = by_transformers,
) -> None:
    """Compare our ids of odd lines with those that others read from an exported tokenizer."""
    make, ties = TOKENIZERS[kind], kind.startswith("unigram") and kind != "unigram like T5's"
    source = make(directory)
    exported = directory / "exported"
    exported.mkdir()
    write_tokenizer(source, exported)
    (exported / "config.json").write_text(json.dumps({"model_type": "llama"}))
    lines = list(odd_lines(count))
    assert len(set(lines)) > count * 0.95
    ours = open_tokenizer(source).encode_batch(lines)
    expected = read(exported, lines)
    wrong = [n for n in range(count) if ours[n] != expected[n]]
    if ties:
        equal = {
            n for n in wrong if _RUN.search(lines[n]) and sorted(ours[n]) == sorted(expected[n])
        }
        assert len(equal) <= count / 500
        wrong = [n for n in wrong if n not in equal]
    assert wrong == [], f"{len(wrong)} lines, first {lines[wrong[0]][:200]!r}"


@pytest.mark.parametrize("kind", ["byte-level bpe", "bpe", "unigram like T5's"])
def test_ids_of_some_hundred_odd_lines(tmp_path: Path, kind: str) -> None:
    check(kind, tmp_path, 300)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_of_ten_thousand_odd_lines(tmp_path: Path, kind: str) -> None:
    check(kind, tmp_path, 10_000)
