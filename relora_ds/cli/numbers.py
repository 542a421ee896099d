"""Numbers on a command line: types for argparse that name value and rule of what they refuse."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass

_UNITS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_AMOUNT = re.compile(
    r"(\d+\.?\d*(?:e[0-9]+)?|\.\d+)\s*([kKMGT]?)(B|B/s|FLOP/s|bit|bit/s)?", re.ASCII
)


@dataclass(frozen=True)
class Count:
    """A whole number.

    Args:
        least: smallest that is taken.
        most: largest that is taken; None for any.
    """

    least: int = 1
    most: int | None = None

    def __call__(self, text: str) -> int:
        """The number in a text.

        Raises:
            argparse.ArgumentTypeError: it is none, or out of its range.
        """
        try:
            value = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"is {text!r}, but must be a whole number") from error
        if value < self.least or (self.most is not None and value > self.most):
            rule = f"at least {self.least}" if self.most is None else f"{self.least} to {self.most}"
            raise argparse.ArgumentTypeError(f"is {value}, but must be {rule}")
        return value


@dataclass(frozen=True)
class Real:
    """A finite number above 0.

    Args:
        below: what it is less than; None for any.
        or_zero: also take 0.
        or_most: also take `below` itself.
    """

    below: float | None = None
    or_zero: bool = False
    or_most: bool = False

    def __call__(self, text: str) -> float:
        """The number in a text.

        Raises:
            argparse.ArgumentTypeError: it is none, or out of its range.
        """
        try:
            value = float(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"is {text!r}, but must be a number") from error
        low = value > 0 or (self.or_zero and value == 0)
        high = self.below is None or value < self.below or (self.or_most and value == self.below)
        if not (low and high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"is {text}, but must be {self._rule()}")
        return value

    def _rule(self) -> str:
        low = "0 or more" if self.or_zero else "above 0"
        if self.below is None:
            return f"a finite number, {low}"
        return f"{low}, and {'at most' if self.or_most else 'less than'} {self.below:g}"


def amount(text: str) -> float:
    """A number above 0 with a decimal unit: 80GB, 450GB/s, 989.4T; of bits as bytes, 100Mbit.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    match = _AMOUNT.fullmatch(text)
    value = float(match[1]) * _UNITS[match[2]] if match is not None else 0.0
    if match is None or not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount: write 80GB, 450GB/s or 100Mbit")
    return value / (8 if (match[3] or "").startswith("bit") else 1)
