"""SentencePiece's named normalisation rules in steps that Hugging Face's tokenizers know.

Their own step for such rules maps a character together with its combining marks by the first rule
that fits, drops the rest, and fails on some texts altogether. The named rules are Unicode's NFKC
(and a case folding) with exceptions, so the steps here are NFKC and whatever this model does
otherwise, found by asking it about every character that may matter.

Unlike NFKC, SentencePiece does not sort marks that are stacked, nor compose a character with one
that stands behind another, or one that was composed before. So they are kept apart except where the
model itself puts them together.
"""

from __future__ import annotations

import sys
import unicodedata
from collections import defaultdict
from typing import Any

from sentencepiece import SentencePieceNormalizer

NAMED = ("nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")
"""Names of the rules that can be expressed."""
_LAST_COMPOSED = 0x1FFFF  # no later one has marks
_LATER_RANGES = (
    (0x32FF, 0x32FF), (0xA7F1, 0xA7F4), (0xAB69, 0xAB69), (0x10780, 0x107BF), (0x1CCD6, 0x1CCF9),
    (0x1E030, 0x1E06F), (0x1F16C, 0x1F16C), (0x1FBF0, 0x1FBF9),
)  # fmt: skip
_LATER = frozenset(code for first, last in _LATER_RANGES for code in range(first, last + 1))
"""What Unicode 12 to 17 map to something else: Hugging Face's NFKC is that of an earlier one."""
_LATER_PAIRS = (
    *("\U00011935\U00011930", "\U000105d2\u0307", "\U000105da\u0307", "\U00011382\U000113c9"),
    *("\U00011384\U000113bb", "\U0001138b\U000113c2", "\U00011390\U000113c9"),
    *("\U000113c2\U000113c2", "\U000113c2\U000113b8", "\U000113c2\U000113c9"),
    *("\U0001611e\U0001611e", "\U0001611e\U00016129", "\U0001611e\U0001611f"),
    *("\U00016129\U0001611f", "\U0001611e\U00016120", "\U00016d67\U00016d67"),
    "\U00016d63\U00016d67",
)
"""What they compose."""
_REPLACEMENT = 0xFFFD  # in the place of bytes that are no character, and a blank to some rules
_MARK = r"[\p{M}\x{FF9E}\x{FF9F}]"
_AFTER = r"[\p{M}\x{FF9E}\x{FF9F}\x{11A8}-\x{11C2}]"  # and what ends a syllable of Hangul
_BREAK, *_PLACEHOLDERS = (chr(code) for code in range(0xFDD0, 0xFDF0))  # no text may hold them


def replace(pattern: str, content: str) -> dict[str, Any]:
    """The step that replaces what a regular expression matches."""
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def named_steps(name: str) -> list[dict[str, Any]]:
    """The steps of the rules of a name.

    Args:
        name: one of `NAMED`.
    """
    folds = name.endswith("_cf")
    candidates = [chr(code) for code in range(1, sys.maxunicode + 1) if _may_matter(code, folds)]
    normaliser = SentencePieceNormalizer(
        rule_name=name,
        add_dummy_prefix=False,
        escape_whitespaces=False,
        remove_extra_whitespaces=False,
    )
    results = dict(zip(candidates, normaliser.Normalize(candidates), strict=True))
    composed = dict(zip(_LATER_PAIRS, normaliser.Normalize(list(_LATER_PAIRS)), strict=True))
    before: dict[str, list[str]] = defaultdict(list)
    later: dict[str, list[str]] = defaultdict(list)
    after: dict[str, str] = {}
    free = iter(_PLACEHOLDERS)
    for character, result in results.items():
        plain = character if ord(character) in _LATER else _nfkc(character, folds)
        if result == plain:
            continue
        if _nfkc(result, folds) == result:
            target = later if ord(character) in _LATER else before
            target[result].append(character)
        elif results.get(plain) == result:  # a pair whose other half is the folded one
            after[plain] = result
        else:
            placeholder = next(free)  # there are more than any rules need
            before[placeholder].append(character)
            after[placeholder] = result
    # what rules of their own make of a character composes with none beside it
    steps = [
        replace(_class(sources), f"{_BREAK}{result}{_BREAK}") for result, sources in before.items()
    ]
    steps += [replace(_class(sources), result) for result, sources in later.items()]
    steps += [replace(_escaped(pair), one) for pair, one in composed.items() if one != pair]
    steps += [replace(_apart(), _BREAK), {"type": "NFKC"}, replace(_BREAK, "")]
    if folds:
        steps.append({"type": "Lowercase"})
    return steps + [replace(_class([source]), result) for source, result in after.items()]


def _nfkc(text: str, folds: bool) -> str:
    normal = unicodedata.normalize("NFKC", text)
    return normal.lower() if folds else normal


def _may_matter(code: int, folds: bool) -> bool:
    """Whether NFKC, a folding or a rule about blanks and controls can name the character."""
    character = chr(code)
    if code in _LATER or code == _REPLACEMENT:
        return True
    category = unicodedata.category(character)
    if category in ("Cs", "Co", "Cn"):
        return False
    if (
        category[0] in "CZ"
        or character == "\u2581"
        or unicodedata.normalize("NFKC", character) != character
    ):
        return True
    return folds and (character.lower() != character or character.casefold() != character)


def _apart() -> str:
    """A regular expression for the places where NFKC would sort or compose, and the model does not:
    between marks that no character has both of, and around what is several characters already."""
    together: dict[tuple[str, str], set[str]] = defaultdict(set)
    several = []
    for code in range(1, _LAST_COMPOSED + 1):
        character = chr(code)
        if len(unicodedata.normalize("NFKD", character)) > 1:
            several.append(character)
        parts = unicodedata.normalize("NFD", character)
        if all(unicodedata.category(mark)[0] == "M" for mark in parts[1:]):
            for end in range(2, len(parts)):
                together[parts[1:end], parts[end]].add(parts[0])
    stacks = "|".join(
        f"(?<={_class(sorted(bases))}{_escaped(first)}){_escaped(second)}"
        for (first, second), bases in together.items()
    )
    double = [character for character in several if unicodedata.category(character)[0] == "M"]
    return (
        f"(?<={_MARK})(?={_MARK})(?!{stacks})|(?<={_class(several)})(?={_AFTER})"
        rf"|(?<=[\s\S])(?={_class(double)})"
    )


def _class(characters: list[str]) -> str:
    """A regular expression for any of some characters, which are in order."""
    ranges: list[list[int]] = []
    for code in map(ord, characters):
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return f"[{''.join(_range(*each) for each in ranges)}]"


def _range(first: int, last: int) -> str:
    return rf"\x{{{first:X}}}" if first == last else rf"\x{{{first:X}}}-\x{{{last:X}}}"


def _escaped(text: str) -> str:
    return "".join(rf"\x{{{ord(character):X}}}" for character in text)
