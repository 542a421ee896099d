"""Overrides from the command line: `method.rank=64` on top of a run file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from relora_ds.config.reading.document import Document, Place, key_name, shorten
from relora_ds.config.reading.source import parse_value
from relora_ds.errors import ConfigError
from relora_ds.redaction import REDACTED, is_secret, mask_urls

_KEY = re.compile(r"[\w.-]+(?=\s*[:=])")


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
    # keys on the left, and those inside of a value such as {api_key: ...}
    secret = any(is_secret(name) for name in _KEY.findall(override))
    shown = f"{key}={REDACTED}" if secret else mask_urls(override)
    place = Place(f"command line: {shorten(shown)}")
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
