"""What the host learns of a device: many figures in one copy, and when queued work was done.

Reading a value makes the host wait until the device has done all that was queued before. Code that
runs between two updates keeps its figures on the device and reads them together, at its end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import torch


def read_together(figures: Sequence[torch.Tensor]) -> list[list[float]]:
    """Values of small tensors, for which the host waits once.

    Args:
        figures: of one device, any shape and real dtype; integers beyond 2^53 lose their last bits.

    Returns:
        The elements of each, in order.
    """
    flat = [figure.reshape(-1).double() for figure in figures]
    values = torch.cat(flat).tolist()
    found, at = [], 0
    for figure in flat:
        found.append(values[at : at + figure.numel()])
        at += figure.numel()
    return found


class Stopwatch:
    """Times between marks in the order of work, without waiting: on a GPU the device takes them.

    Args:
        device: where the work is queued.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        """Note when all that was queued so far is done."""
        if not self._on_gpu:
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def seconds(self) -> list[float]:
        """Times between one mark and the next; the device must have reached the last one."""
        if self._on_gpu:
            return [first.elapsed_time(last) / 1000.0 for first, last in pairwise(self._events)]
        return [last - first for first, last in pairwise(self._times)]
