"""The keys that a run file may hold, read off the schema."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from pydantic.fields import FieldInfo

from relora_ds.config.base import Section
from relora_ds.config.method import MethodConfig
from relora_ds.config.schema import RunConfig


@cache
def method_models() -> dict[str, type[Section]]:
    """Method name -> the model of its settings."""
    union, *_ = get_args(MethodConfig)
    return {get_args(model.model_fields["name"].annotation)[0]: model for model in get_args(union)}


@cache
def run_keys() -> frozenset[str]:
    """Every dotted key of a run file, sections included, over all methods."""
    keys = set(_keys(RunConfig, ""))
    for model in method_models().values():
        keys.update(_keys(model, "method."))
    return frozenset(keys)


def section_model(field: FieldInfo) -> type[Section] | None:
    """The model behind a field, or None for a plain value."""
    return as_section(field.annotation)


def as_section(annotation: Any) -> type[Section] | None:
    """`annotation` itself if it is a section, else None."""
    is_model = isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation if is_model else None


def _keys(model: type[Section], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        nested = section_model(field)
        if nested is not None:
            yield from _keys(nested, f"{prefix}{name}.")
