"""The port through which a method gets dense gradients of weights that are not trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn


class Gradients(ABC):
    """Dense gradients of frozen weights at the coming update, outside of DeepSpeed's reduction."""

    batch: Callable[[], Iterable[torch.Tensor]]
    """This rank's micro-batches of tokens (B, S + 1) of the coming update; none if it is left
    out."""

    @property
    @abstractmethod
    def owners(self) -> int:
        """Processes that take turns in owning whole gradients."""

    @abstractmethod
    def passes(self) -> Iterator[int]:
        """Pass the coming update's micro-batches through the model, forward and backward.

        No gradient of a parameter is kept: whoever wants one takes it while its module is on its
        way back. This rank's mean gradient is the sum of what is taken, divided by the number of
        passes.

        Yields:
            Before every pass how many are to follow it; nothing if the batch is left out.
        """

    @abstractmethod
    def mean(self, weight: nn.Parameter, part: torch.Tensor, turn: int) -> torch.Tensor | None:
        """The mean over the data-parallel ranks of a frozen weight's gradient. A collective call.

        Args:
            weight: whose gradient it is.
            part: this rank's gradient of its part of the weight, fp32; overwritten.
            turn: number of the owner.

        Returns:
            The whole gradient, of the weight's global shape, on the owner; None elsewhere.
        """

    @abstractmethod
    def spread(self, value: torch.Tensor, turn: int) -> torch.Tensor:
        """The owner's value, written into everyone's. A collective call.

        Args:
            value: contiguous, of the same shape and dtype on every rank.
            turn: number of the owner.
        """
