"""Copies of live values in host memory, so that training can go on while they are written.

Tensors that share memory share it in the copy: a file of the copy has the bytes of a file of the
original. On CUDA the copies are queued on a stream of their own into pinned memory; training's
stream waits for them on the device, the host waits for nothing.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from relora_ds.checkpoint.saving.contents import Contents

_logger = logging.getLogger(__name__)
_PLAIN = frozenset({type(None), bool, int, float, str, bytes, torch.Size, torch.dtype})
"""Types of values that nothing changes."""


@dataclass(frozen=True)
class Snapshot:
    """Contents that nothing changes any more."""

    contents: Contents
    bytes: int
    """Of its tensors."""
    wait: Callable[[], None]
    """Returns when all of it has arrived in host memory."""


class HostBuffers:
    """Host memory of snapshots, kept from one to the next: touching new pages takes longer than
    the copy.

    Args:
        device: where the values are; memory is pinned for CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._free: dict[int, list[torch.Tensor]] = {}
        self._used: list[torch.Tensor] = []

    def take(self, nbytes: int) -> torch.Tensor:
        """A buffer of bytes, uint8 of shape (nbytes,); its content is undefined.

        Raises:
            MemoryError: the host has no room for it.
        """
        free = self._free.get(nbytes)
        buffer = free.pop() if free else None
        if buffer is None:
            buffer = self._allocate(nbytes)
        self._used.append(buffer)
        return buffer

    def _allocate(self, nbytes: int) -> torch.Tensor:
        if self._pinned:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                _logger.warning(
                    "host memory for copies of the state cannot be pinned, training waits for "
                    "them: raise the limit on locked memory (ulimit -l unlimited) (%s)",
                    str(error).partition("\n")[0],
                )
                self._pinned = False
        try:
            return torch.empty(nbytes, dtype=torch.uint8)
        except RuntimeError as error:  # torch's word for a lack of memory
            raise MemoryError(str(error)) from error

    def recycle(self) -> None:
        """Give back what is in use; what was free before is let go, as of a phase that is over."""
        self._free = {}
        for buffer in self._used:
            self._free.setdefault(buffer.numel(), []).append(buffer)
        self._used = []


def take_snapshot(contents: Contents, device: torch.device, buffers: HostBuffers) -> Snapshot:
    """Copy everything in `contents` as it is now.

    Args:
        contents: live.
        device: where the process computes.
        buffers: what the copies are put into, until they are recycled.
    """
    copier = _Copier(buffers)
    if device.type != "cuda":
        copied = copier.copy_contents(contents)
        return Snapshot(copied, copier.bytes, lambda: None)
    training, own = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    own.wait_stream(training)
    with torch.cuda.stream(own):
        copied = copier.copy_contents(contents)
        arrived = torch.cuda.Event()
        arrived.record(own)
    training.wait_stream(own)  # the next update must not overtake the copies
    return Snapshot(copied, copier.bytes, arrived.synchronize)


class _Copier:
    """Copies values; what is the same object or shares memory stays so."""

    def __init__(self, buffers: HostBuffers) -> None:
        self.bytes = 0
        """Copied so far."""
        self._buffers = buffers
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._seen: dict[int, tuple[object, object]] = {}
        """By identity: the original, which keeps the identity from being used again, and a copy."""

    @torch.no_grad()
    def copy_contents(self, contents: Contents) -> Contents:
        return {
            name: content.with_values(self._copy(content.values()))
            for name, content in contents.items()
        }

    def _copy(self, value: object) -> Any:
        if type(value) in _PLAIN:
            return value
        seen = self._seen.get(id(value))
        if seen is None:
            seen = self._seen[id(value)] = value, self._copy_new(value)
        return seen[1]

    def _copy_new(self, value: object) -> object:
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value)
        if isinstance(value, dict):
            twin = copy.copy(value)  # its type, and what a state_dict carries beside its items
            for key, item in value.items():
                twin[key] = self._copy(item)
            return twin
        if type(value) is list:
            return [self._copy(item) for item in value]
        if type(value) is tuple:
            return tuple(self._copy(item) for item in value)
        return copy.deepcopy(value)

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        twin = torch.empty(0, dtype=tensor.dtype)
        storage = self._copy_storage(tensor.untyped_storage())
        twin.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin)
        if tensor.requires_grad != twin.requires_grad:
            twin.requires_grad_(tensor.requires_grad)
        if vars(tensor):
            vars(twin).update(self._copy(vars(tensor)))  # what DeepSpeed notes on it
        return twin

    def _copy_storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        key = storage._cdata
        if key not in self._storages:
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            buffer = self._buffers.take(storage.nbytes())
            self.bytes += storage.nbytes()
            buffer.copy_(source, non_blocking=True)
            self._storages[key] = buffer.untyped_storage()
        return self._storages[key]
