"""Overrides from the command line: `method.rank=64` on top of a run file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from relora_ds.config.reading.document import Document, Place, key_name, shorten
from relora_ds.config.reading.source import parse_value
from relora_ds.errors import ConfigError
from relora_ds.redaction import REDACTED, is_secret, mask_urls

# Every word is tried once, from its start and as a whole: values may be 100,000 characters long.
_KEY = re.compile(r"(?<![\w.-])[\w.-]++(?=\s*[:=])")
_PLAIN_KEY = re.compile(r"\s*[\w.-]+\s*")


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Write `key=value` arguments into `document`; the last of several for one key wins.

    The value is YAML, so `null`, `[0.9, 0.95]` and `{mode: zero}` work. What cannot be applied goes
    to `document.problems`; whether the key exists and the value fits is for validation to say.
    """
    for override in overrides:
        try:
            _apply(document, override)
        except ConfigError as error:
            document.problems.extend(error.problems)


def _apply(document: Document, override: str) -> None:
    key, equals, text = override.partition("=")
    place = Place(f"command line: {shorten(_without_secrets(override))}")
    if not equals:
        raise ConfigError(f"{place}: is not an override: write key=value, as in train.steps=1000")
    path = tuple(key.strip().split("."))
    if not all(path):
        raise ConfigError(f"{place}: the key is not complete: write it as in train.steps=1000")
    if not text.strip():
        raise ConfigError(f"{place}: has no value: write {key}=null to set it to nothing")
    value = parse_value(text, place)
    try:
        document.assign(path, value, place)
    except TypeError as error:
        raise ConfigError(
            f"{place}: {error} is a single value and has no key {key_name(path[-1:])}: "
            f"write {error}=..."
        ) from None


def _without_secrets(override: str) -> str:
    """What may be told of an override: no value under a secret's name, no credential of a URL."""
    key, equals, _ = override.partition("=")
    # keys on the left, and those inside of a value such as {api_key: ...}
    names = _KEY.findall(override) if equals else [override]
    if not any(is_secret(name) for name in names):
        return mask_urls(override)
    # "api_key: VALUE" is no key: with the equals sign forgotten, or at the end of a base64 value
    return f"{key}={REDACTED}" if equals and _PLAIN_KEY.fullmatch(key) else REDACTED
