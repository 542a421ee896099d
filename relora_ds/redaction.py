"""Keeping credentials out of everything that is written or sent.

Two places leak them in practice: a configuration that is uploaded whole, and a log line or
traceback that quotes an environment variable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "[redacted]"

_SECRET = re.compile(
    r"(?i)key|token|secret|passw|passphrase|pwd|credential|bearer|authorization|(?<![a-z])auth$"
)
_IN_URL = re.compile(r"(?<=://)(?:[^/\s:@]+:(?!\d{1,5}/)[^\s\"']{1,2000}|[^/\s]+)(?=@)")
"""User and password before the host, up to the last "@": passwords hold that sign and "/" too. What
begins as a port does is none."""
_IN_QUERY = re.compile(r"(?<=[?&;#])([\w.%-]++)=([^&;#\s\"']+)")
"""A name and its value behind the path of a URL."""
# Words of this field that merely contain "key" or "token": tokenizer, tokens_seen,
# num_key_value_heads, eos_token_id. The shell keeps the current folder in PWD and OLDPWD.
_INNOCENT = re.compile(
    r"(?i)tokeni[sz][a-z]*|^tokens(?![a-z])|key_value|token_ids?$|^(?-i:(?:OLD)?PWD)$"
)
# Shorter values, such as "true", occur in ordinary text: masking them would only garble it.
_SHORTEST_SECRET = 8


def is_secret(name: str) -> bool:
    """Whether a setting or environment variable of this name holds a credential."""
    return _SECRET.search(_INNOCENT.sub("", name)) is not None


def redact(value: Any) -> Any:
    """A copy of nested mappings and sequences in which credentials read ``[redacted]``, also those
    inside of URLs.

    Only text is replaced: a number under a name such as ``max_token`` is a count.
    """
    if isinstance(value, str):
        return mask_urls(value)
    if isinstance(value, Mapping):
        return {
            key: _mask(item) if is_secret(str(key)) else redact(item) for key, item in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [redact(item) for item in value]
    return value


def _mask(value: Any) -> Any:
    """`value` with every text in it replaced, however deep."""
    if isinstance(value, Mapping):
        return {key: _mask(item) for key, item in value.items()}
    if isinstance(value, str | bytes):
        return REDACTED
    if isinstance(value, Sequence):
        return [_mask(item) for item in value]
    return value


def mask_urls(text: str) -> str:
    """`text` with every credential replaced that a URL in it holds: user and password before the
    host, and values of the query under a secret's name.
    """
    return _IN_QUERY.sub(_mask_parameter, _IN_URL.sub(REDACTED, text))


def _mask_parameter(found: re.Match[str]) -> str:
    name = found[1]
    return f"{name}={REDACTED}" if is_secret(name) else found[0]


def secret_values(environ: Mapping[str, str]) -> list[str]:
    """Values of the environment's credentials, longest first so that none is masked in part."""
    values = {value for name, value in environ.items() if is_secret(name)}
    return sorted((v for v in values if len(v) >= _SHORTEST_SECRET), key=len, reverse=True)


def mask_values(text: str, secrets: Sequence[str]) -> str:
    """`text` with every occurrence of a secret replaced, and what URLs hold."""
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    return mask_urls(text)
