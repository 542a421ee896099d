"""Tokens that follow each other, and the samples of a fixed length that they are cut into."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np

from relora_ds.data.sampler import num_samples
from relora_ds.errors import DataError


class Samples(Protocol):
    """Samples of S + 1 tokens each, by number, for any length S."""

    @property
    def max_token_id(self) -> int:
        """No id in them is larger."""
        ...

    def num_samples(self, seq_length: int) -> int:
        """How many there are of `seq_length + 1` tokens.

        Raises:
            DataError: there is not even one.
        """
        ...

    def sample(self, number: int, seq_length: int) -> np.ndarray:
        """A copy of one of them, int64 of shape (seq_length + 1,)."""
        ...


class TokenStream(ABC):
    """One flat stream of tokens. Neighbouring samples share a token: each but the first is a target
    once."""

    prefix: str
    """Path, without suffix, of the files that hold the tokens."""
    num_tokens: int
    """Tokens in the stream."""

    @property
    @abstractmethod
    def max_token_id(self) -> int:
        """No id in the stream is larger."""

    @abstractmethod
    def window(self, start: int, count: int) -> np.ndarray:
        """A copy of tokens `[start, start + count)`, int64 of shape (count,).

        Raises:
            IndexError: the window is not inside of the stream.
        """

    def num_samples(self, seq_length: int) -> int:
        """Samples of `seq_length + 1` tokens.

        Raises:
            DataError: there is not even one.
        """
        count = num_samples(self.num_tokens, seq_length)
        if count == 0:
            raise DataError(
                f"{self.prefix}.bin: {self._amount()}, but one sample of train.seq_length "
                f"{seq_length} takes {seq_length + 1}; {self._remedy()}"
            )
        return count

    def sample(self, number: int, seq_length: int) -> np.ndarray:
        """Sample `number`, int64 of shape (seq_length + 1,)."""
        return self.window(number * seq_length, seq_length + 1)

    def _amount(self) -> str:
        return f"{self.num_tokens} tokens"

    def _remedy(self) -> str:
        return "use a larger corpus or shorter sequences"
