"""Stopping at a step boundary when anybody asked any rank to."""

from __future__ import annotations

import torch

from relora_ds.train.lifetime.requests import StopRequests


class StopSignal:
    """The agreement of all ranks on whether to stop.

    Signals reach ranks at different times, so the loop asks `agreed`, a collective, and never acts
    on what one rank has heard.

    Args:
        requests: what this rank has heard.
    """

    def __init__(self, requests: StopRequests) -> None:
        self._requests = requests
        # its own group on the host: the answer must not wait for work queued on a device
        self._group = torch.distributed.new_group(backend="gloo")

    def take_over(self) -> None:
        """Have requests wait for `agreed` from now on: there is something to save."""
        self._requests.defer()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. A collective call."""
        flag = torch.tensor([int(self._requests.pending is not None)])
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag.item())
