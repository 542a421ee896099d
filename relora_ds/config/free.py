"""The keys whose values a resumed run may change, as the fields themselves say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from relora_ds.config.base import OnResume, Section
from relora_ds.config.keys import section_models


def free_keys(model: type[Section]) -> frozenset[str]:
    """Dotted keys below a section that are marked `Free`; a marked section covers all keys in it.

    A key that several methods have is free only if each of them marks it.
    """
    free: set[str] = set()
    bound: set[str] = set()
    for key, is_free in _marks(model, ""):
        (free if is_free else bound).add(key)
    return frozenset(free - bound)


def covers(keys: frozenset[str], key: str) -> bool:
    """Whether a dotted key, or a section that it is in, is among `keys`."""
    return any(key == name or key.startswith(f"{name}.") for name in keys)


def flat_settings(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested settings by dotted key."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from flat_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _marks(model: type[Section], prefix: str) -> Iterator[tuple[str, bool]]:
    """Every plain key, and every section that is marked as a whole, with whether it is free."""
    for name, field in model.model_fields.items():
        is_free = OnResume.FREE in field.metadata
        nested = section_models(field)
        if is_free or not nested:
            yield prefix + name, is_free
            continue
        for section in nested:
            yield from _marks(section, f"{prefix}{name}.")
