"""Losses and gradient norms since the last line of the log, left on the device until then."""

from __future__ import annotations

import math

import torch

from relora_ds.engine.distributed import mean_over_ranks


class Seen:
    """What the updates since the last line found; noting one waits for nothing."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        """Steps, from 0, in order."""
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []

    def note(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Take up an update: fp32 scalars, the loss of this rank and the norm of all."""
        self.steps.append(step)
        self._losses.append(loss)
        self._norms.append(norm)

    def over_ranks(self) -> tuple[float, float, tuple[int, str] | None]:
        """Mean loss and gradient norm of the last update, and the first that is not finite.

        A collective call that waits for the device.

        Returns:
            Loss; norm; None, or the step and what is wrong with it on any rank, in words.
        """
        device = self._losses[-1].device
        norms = torch.stack([norm.to(device) for norm in self._norms])
        # the last loss for the report; the sums for whether any before was not finite
        sums = torch.stack([self._losses[-1], torch.stack(self._losses).sum(), norms.sum()])
        loss, *totals = mean_over_ranks(sums).tolist()
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
