"""The keys that a run file may hold, read off the schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from relora_ds.config.base import Section
from relora_ds.config.methods.base import MethodSettings
from relora_ds.config.methods.catalogue import method_models
from relora_ds.config.schema import RunConfig


def run_keys() -> frozenset[str]:
    """Every dotted key of a run file, sections included, over all methods."""
    return frozenset(_keys(RunConfig, ""))


def section_models(field: FieldInfo) -> tuple[type[Section], ...]:
    """The models that a field may hold: none for a plain value, one per method for a method's."""
    model = section_model(field)
    if model is MethodSettings:
        return tuple(method_models().values())
    return () if model is None else (model,)


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
        for nested in section_models(field):
            yield from _keys(nested, f"{prefix}{name}.")
