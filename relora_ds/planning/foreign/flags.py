"""Flags of another trainer as they are written, read as what they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from relora_ds.errors import ConfigError


def is_on(value: str | None) -> bool:
    """Whether a switch or a boolean is set."""
    return value is not None and value.lower() in ("true", "1", "yes")


class Flags(Mapping[str, str]):
    """Values by name without dashes; a switch is `true`.

    Args:
        values: as they are written.
    """

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> str:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def text(self, name: str) -> str:
        """The value of a flag.

        Raises:
            ConfigError: it is missing.
        """
        if name not in self:
            raise ConfigError(
                f"the flag {name} is missing, and its trainer has no default for it: add it"
            )
        return self[name]

    def is_on(self, name: str) -> bool:
        """Whether a switch is set."""
        return is_on(self.get(name))

    def whole(self, name: str, default: int | None = None) -> int:
        """A flag as a whole number.

        Raises:
            ConfigError: it is none, or missing without a default.
        """
        if name not in self and default is not None:
            return default
        text = self.text(name)
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"the flag {name} is {text}, but must be a whole number") from None

    def real(self, name: str, default: float | None = None) -> float:
        """A flag as a finite number.

        Raises:
            ConfigError: it is none, or missing without a default.
        """
        if name not in self and default is not None:
            return default
        text = self.text(name)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(f"the flag {name} is {text}, but must be a number")
        return value
