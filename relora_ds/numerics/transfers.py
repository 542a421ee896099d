"""What travels between the host and a device, and what must not be waited for on the way.

Reading a value makes the host wait until the device has done all that was queued before. Code that
runs between two updates keeps its figures on the device and reads them together, at its end;
indices go there without waiting, and are used without a sort where none repeats.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host on a device.

    The host does not wait: a copy from pageable memory would hold it until the device has done all
    that was queued before.

    Args:
        tensor: on the CPU; the copy is read later, so it must not be written to any more, unless
            the device is a GPU, for which it is staged first.
        device: where it goes; on the CPU it stays what it is.
    """
    if device.type != "cpu":
        tensor = tensor.pin_memory()  # kept by torch's allocator until the copy has been made
    return tensor.to(device, non_blocking=True)


def upload_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Small integer tensors of the host on a device, in one copy, for which the host does not wait.

    Args:
        tensors: int64, on the CPU, any shapes.
        device: where they go.
    """
    if not tensors:
        return []
    flat = upload(torch.cat([tensor.reshape(-1) for tensor in tensors]), device)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


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


@contextmanager
def orderless_writes() -> Iterator[None]:
    """The order of writes by index within it makes no difference: they name no place twice, or add
    integers.

    torch's deterministic mode sorts the indices of every such write on a GPU. It is off in here;
    for the whole process, so that the block must not wait for another thread.
    """
    mode = torch.get_deterministic_debug_mode()
    if not mode:
        yield
        return
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
