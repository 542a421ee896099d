"""The common base of every configuration model, and the constrained numbers they use."""

from __future__ import annotations

import os
from enum import Enum
from typing import Annotated, TypeVar, dataclass_transform

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

LARGEST = 2**40
"""No count of steps, tokens, elements or minutes comes near it, and products still fit a float."""
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _from_home(path: str) -> str:
    """A path with the home directory in place of a leading `~/`, which no shell has seen here."""
    if not path.startswith("~/"):
        return path
    expanded = os.path.expanduser(path)
    if expanded == path:
        rule = "must be a whole path: this user has no home directory"
        raise PydanticCustomError("no_home", rule)
    return expanded


FilePath = Annotated[
    str,
    Field(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$", max_length=4096),
    AfterValidator(_from_home),
]
"""Name of a file or directory: not blank, and without the character that no name can hold."""


class OnResume(Enum):
    """What a resumed run may do with a key of the run that it continues."""

    FREE = "free"
    """Change it: neither the trained function nor the order of the data depends on it."""


T = TypeVar("T")
Free = Annotated[T, OnResume.FREE]
"""A key, or a section with every key in it, that a resumed run may change."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
class _Frozen(type(BaseModel)):
    """Tells type checkers that sections are frozen, so that one may narrow the type of a key that
    it inherits."""


class Section(BaseModel, metaclass=_Frozen):
    """A frozen part of the run description: unknown keys, coerced types and nan are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
