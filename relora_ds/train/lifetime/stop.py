"""Stopping at a step boundary when anybody asked any rank to."""

from __future__ import annotations

from relora_ds.train.lifetime.requests import StopRequests


class StopSignal:
    """Whether this rank was asked to stop.

    Signals reach ranks at different times, so the loop passes `requested` on where all ranks meet
    after a step, and never acts on what one rank has heard.

    Args:
        requests: what this rank has heard.
    """

    def __init__(self, requests: StopRequests) -> None:
        self._requests = requests

    def take_over(self) -> None:
        """Have requests wait for the end of a step from now on: there is something to save."""
        self._requests.defer()

    def requested(self) -> bool:
        """Whether this rank has heard a request that is to be met."""
        return self._requests.pending is not None
