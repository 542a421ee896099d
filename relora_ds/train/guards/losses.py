"""Losses and gradient norms since the last line of the log, left on the device until then."""

from __future__ import annotations

import math

import torch

from relora_ds.engine.distributed import mean_over_ranks


class Targets:
    """How many of the positions of an update's micro-batches are trained on.

    Args:
        document_end: id behind which a token is no target; None where every token is one.
    """

    def __init__(self, document_end: int | None) -> None:
        self._document_end = document_end
        self._positions = 0
        self._left_out = 0

    def count(self, tokens: torch.Tensor) -> None:
        """Take up a micro-batch, int64 (B, S + 1) on the host."""
        if self._document_end is not None:
            self._positions += tokens[:, :-1].numel()
            self._left_out += int((tokens[:, :-1] == self._document_end).sum())

    @property
    def share(self) -> float | None:
        """Share of the positions so far; None where every token is a target."""
        return 1.0 - self._left_out / self._positions if self._positions else None


class Seen:
    """What the updates since the last line found; noting one waits for nothing."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        """Steps, from 0, in order."""
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._share: float | None = None

    def note(
        self, step: int, loss: torch.Tensor, norm: torch.Tensor, share: float | None = None
    ) -> None:
        """Take up an update.

        Args:
            step: from 0.
            loss: of this rank, the mean over all positions: a fp32 scalar.
            norm: of all ranks, likewise.
            share: of the positions that are targets; None for all of them, on every rank.
        """
        self._share = share
        self.steps.append(step)
        self._losses.append(loss)
        self._norms.append(norm)

    def over_ranks(self) -> tuple[float, float, tuple[int, str] | None]:
        """Mean loss of the last update's targets, its gradient norm, and the first that is not
        finite.

        A collective call that waits for the device.

        Returns:
            Loss; norm; None, or the step and what is wrong with it on any rank, in words.
        """
        device = self._losses[-1].device
        norms = torch.stack([norm.to(device) for norm in self._norms])
        # the last loss for the report; the sums for whether any before was not finite
        sums = [self._losses[-1], torch.stack(self._losses).sum(), norms.sum()]
        if self._share is not None:
            sums.append(sums[0].new_tensor(self._share))
        loss, *totals = mean_over_ranks(torch.stack(sums)).tolist()
        if self._share is not None:
            loss /= totals.pop() or 1.0  # a batch without a target has no loss
        if all(math.isfinite(total) for total in totals):
            return loss, float(self._norms[-1]), None
        means = mean_over_ranks(torch.stack([torch.stack(self._losses), norms])).t().tolist()
        for step, figures in zip(self.steps, means, strict=True):
            if not all(map(math.isfinite, figures)):
                what = f"the training loss is {figures[0]} and the gradient norm {figures[1]}"
                return figures[0], figures[1], (step, what)
        # each is finite, but their sum overflows
        what = f"the sums of losses and gradient norms are {totals}"
        return loss, float(self._norms[-1]), (self.steps[-1], what)
