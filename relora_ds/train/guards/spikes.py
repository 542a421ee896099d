"""A loss or a gradient norm far above the last ones."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from relora_ds.config.sections import LossSpikeConfig


class SpikeDetector:
    """Compares each update with a window of the ones before it.

    Args:
        config: how far above, and how many updates.
        losses: of the last updates, oldest first.
        norms: their gradient norms.
    """

    def __init__(
        self, config: LossSpikeConfig, losses: Iterable[float] = (), norms: Iterable[float] = ()
    ) -> None:
        self._sigma, self._needed = config.sigma, config.window // 2
        self.losses = deque(losses, maxlen=config.window)
        """Losses in the window, oldest first."""
        self.norms = deque(norms, maxlen=config.window)
        """Gradient norms of the same updates."""

    def find(self, loss: float, norm: float) -> str | None:
        """What is a spike, in words; None if nothing is, or too few updates are known."""
        figures = ("training loss", loss, self.losses), ("gradient norm", norm, self.norms)
        for name, value, window in figures:
            if len(window) < self._needed:
                continue
            mean, deviation = _mean_and_deviation(window)
            if value > mean + self._sigma * deviation:
                return (
                    f"the {name} is {value:.6g}, more than {self._sigma:g} standard deviations "
                    f"({deviation:.3g}) above the mean of the last {len(window)} updates "
                    f"({mean:.6g})"
                )
        return None

    def take(self, loss: float, norm: float) -> None:
        """Remember an update that was applied."""
        self.losses.append(loss)
        self.norms.append(norm)


def _mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """By exact sums, so that the answer depends on the values alone."""
    known = list(values)
    mean = math.fsum(known) / len(known)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1))
