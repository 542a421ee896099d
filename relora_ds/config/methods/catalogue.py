"""The settings of every known method by name, and the type of a run's `method` section.

What is registered while the program runs is known everywhere at once: keys, errors and validation
look here whenever they are asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, reduce
from operator import or_
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import Field, PlainValidator, SerializeAsAny, TypeAdapter, ValidationInfo
from pydantic_core import to_json

from relora_ds.config.methods.base import MethodSettings

SettingsT = TypeVar("SettingsT", bound=MethodSettings)

_REGISTERED: dict[str, type[MethodSettings]] = {}


def register_settings(model: type[SettingsT]) -> type[SettingsT]:
    """Make settings known by their `name`, a literal; to be used as a decorator.

    Raises:
        ValueError: `name` is not one literal text, or belongs to other settings.
    """
    name = _name_of(model)
    if name in _REGISTERED:
        raise ValueError(f"method {name!r} is registered already, as {_REGISTERED[name].__name__}")
    _REGISTERED[name] = model
    return model


@contextmanager
def registered(model: type[MethodSettings]) -> Iterator[None]:
    """Register settings for the duration of a `with` block."""
    register_settings(model)
    try:
        yield
    finally:
        del _REGISTERED[_name_of(model)]


def method_models() -> dict[str, type[MethodSettings]]:
    """Method name -> the model of its settings, by name."""
    return dict(sorted(_REGISTERED.items()))


def _name_of(model: type[MethodSettings]) -> str:
    annotation = model.model_fields["name"].annotation
    names = get_args(annotation) if get_origin(annotation) is Literal else ()
    if len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(f"{model.__name__}.name must be annotated with one text: Literal['...']")
    return names[0]


def _validate(value: Any, info: ValidationInfo) -> MethodSettings:
    adapter = _adapter(tuple(method_models().values()))
    if info.mode == "json":
        # only JSON may write a tuple as a list
        return adapter.validate_json(to_json(value, inf_nan_mode="constants"))
    return adapter.validate_python(value)


@lru_cache(maxsize=1)
def _adapter(models: tuple[type[MethodSettings], ...]) -> TypeAdapter[Any]:
    """A validator that takes the model which `name` chooses."""
    union = reduce(or_, models)
    return TypeAdapter(Annotated[union, Field(discriminator="name")])  # pyright: ignore


MethodConfig = Annotated[SerializeAsAny[MethodSettings], PlainValidator(_validate)]
"""The settings of any registered method; `name` says of which one."""
