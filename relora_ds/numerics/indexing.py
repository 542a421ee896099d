"""Indices on a GPU: brought there without waiting, and used without a sort where none repeats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
    if device.type == "cuda":
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
